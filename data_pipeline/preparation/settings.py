"""What decides the bytes of a shard folder, beside the source."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from data_pipeline.cleaning.clean import CleaningOptions, rule_names
from data_pipeline.errors import DataError

LONG_DOCUMENTS = ("split", "drop")


@dataclass(frozen=True)
class Settings:
    """How to make shards of rows.

    tokenizer: `train`, a folder or a hub name. vocab_size: the upper limit of a trained tokenizer's. seq_len: tokens a
    packed row. sources: keep rows of these alone, all where empty; exclude_sources: drop rows of these. minimum_tokens:
    drop documents with fewer, special tokens not counted. long_documents: `split` those longer than a row, or `drop`
    them. validation_share: the share of questions whose rows become the validation folder. near_duplicates: the Jaccard
    similarity from which two rows count as the same, None to look for exact duplicates alone. decontaminate: files of
    evaluation texts; rows that share an n-gram with them are dropped.
    Raises DataError for values that cannot work.
    """

    tokenizer: str = "train"
    vocab_size: int = 2000
    seq_len: int = 1024
    rows_per_shard: int = 4096
    sources: tuple[str, ...] = ()
    exclude_sources: tuple[str, ...] = ()
    minimum_tokens: int = 1
    long_documents: str = "split"
    validation_share: float = 0.0
    near_duplicates: float | None = None
    decontaminate: tuple[str, ...] = ()
    cleaning: CleaningOptions = field(default_factory=CleaningOptions)

    def __post_init__(self) -> None:
        # Shorter rows cut every question from its answer; a member's name has six digits for its row.
        limits = {"seq_len": (16, 2**20), "rows_per_shard": (1, 10**6), "minimum_tokens": (1, 2**20)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                size = "small" if getattr(self, name) < least else "large"
                raise DataError(f"{name} {getattr(self, name)} is too {size}: give {least} to {most:,}")
        if self.long_documents not in LONG_DOCUMENTS:
            raise DataError(f"long_documents is {self.long_documents!r}: give one of {', '.join(LONG_DOCUMENTS)}")
        if not 0 <= self.validation_share < 1:
            raise DataError(f"validation_share {self.validation_share} is no share: give 0 or more and less than 1")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise DataError(f"near_duplicates {self.near_duplicates} is no similarity: give more than 0, at most 1")
        if both := set(self.sources) & set(self.exclude_sources):
            raise DataError(f"the source {min(both)} is asked for and excluded: name it in one of the two")

    def config(self) -> dict:
        """All that decides the bytes, as JSON values; of the tokenizer and the evaluation texts, others know more."""
        values = asdict(self)
        del values["tokenizer"], values["vocab_size"], values["decontaminate"]
        return values | {
            "sources": sorted(self.sources),
            "exclude_sources": sorted(self.exclude_sources),
            "cleaning": {**asdict(self.cleaning), "rules": rule_names(self.cleaning)},
        }

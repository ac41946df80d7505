"""The settings that, together with the source, determine the bytes of a shard folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from data_pipeline.augmentation.augmentations import AUGMENTATIONS
from data_pipeline.cleaning.clean import VERSION as CLEANING_VERSION
from data_pipeline.cleaning.clean import CleaningOptions, rule_names
from data_pipeline.deduplication.shingles import WORDS_VERSION
from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import ON_BAD_ROW
from data_pipeline.sources.files import FileChoice
from data_pipeline.sources.layout_choice import LayoutChoice

LONG_DOCUMENTS = ("split", "drop")


@dataclass(frozen=True)
class Settings:
    """How to make shards from rows.

    tokenizer: `train`, a folder, or a name on the hub.
    vocab_size: upper limit for the vocabulary of a trained tokenizer.
    seq_len: tokens per packed row.
    sources: keep only rows of these sources; empty keeps all. exclude_sources: drop rows of these.
    minimum_tokens: drop documents with fewer tokens, not counting special tokens.
    long_documents: `split` or `drop` documents that are longer than a row.
    validation_share: the share of questions whose rows go to the validation folder.
    near_duplicates: Jaccard similarity from which two rows count as the same; None drops exact duplicates only.
    augment: names of augmentations; each adds a copy of every row that it applies to.
    files: which files of folders are read.
    on_bad_row: `refuse` a row that cannot be read, or `skip` and count it.
    layout: how columns become texts, as far as the user says; `prepare` finds the rest.
    decontaminate: files of evaluation texts; rows that share an n-gram with them are dropped.
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
    augment: tuple[str, ...] = ()
    files: FileChoice = field(default_factory=FileChoice)
    on_bad_row: str = "refuse"
    layout: LayoutChoice = field(default_factory=LayoutChoice)
    cleaning: CleaningOptions = field(default_factory=CleaningOptions)

    def __post_init__(self) -> None:
        # Shorter rows would cut every question from its answer. A tar member's name has six digits for its row.
        limits = {"seq_len": (16, 2**20), "rows_per_shard": (1, 10**6), "minimum_tokens": (1, 2**20)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                size = "small" if getattr(self, name) < least else "large"
                raise DataError(f"{name} {getattr(self, name)} is too {size}: give {least} to {most:,}")
        if self.long_documents not in LONG_DOCUMENTS:
            raise DataError(f"long_documents is {self.long_documents!r}: give one of {', '.join(LONG_DOCUMENTS)}")
        if not 0 <= self.validation_share < 1:
            raise DataError(f"validation_share is {self.validation_share}: give at least 0 and less than 1")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise DataError(f"near_duplicates is {self.near_duplicates}: give a similarity above 0 and at most 1")
        if self.on_bad_row not in ON_BAD_ROW:
            raise DataError(f"on_bad_row is {self.on_bad_row!r}: give one of {', '.join(ON_BAD_ROW)}")
        if unknown := [name for name in self.augment if name not in AUGMENTATIONS]:
            raise DataError(f"there is no augmentation {unknown[0]!r}: give some of {', '.join(AUGMENTATIONS)}")
        if both := set(self.sources) & set(self.exclude_sources):
            raise DataError(f"the source {min(both)} is both in sources and in exclude_sources: name it in one of them")

    def config(self) -> dict:
        """Return what determines the bytes, as JSON values; the caller adds the tokenizer and the evaluation texts."""
        values = asdict(self)
        del values["tokenizer"], values["vocab_size"], values["decontaminate"], values["layout"], values["files"]
        return values | {
            "sources": sorted(self.sources),
            "augment": list(self.augment),
            "exclude_sources": sorted(self.exclude_sources),
            "near_duplicate_words": None if self.near_duplicates is None else WORDS_VERSION,
            "cleaning": {
                "unicode_form": self.cleaning.unicode_form,
                "newlines": self.cleaning.newlines,
                "rules": rule_names(self.cleaning),
                "version": CLEANING_VERSION,
            },
        }

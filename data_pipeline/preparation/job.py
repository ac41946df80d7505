"""The description of a preparation job, the possible fates of a row, and a timer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.preparation.scratch import work_folder
from data_pipeline.preparation.settings import Settings
from data_pipeline.sources.chunk import Chunk
from data_pipeline.sources.layouts import Layout

# What can happen to a row. Fates before FIRST_REASON keep it; the others are reasons to drop it.
FATES = (
    "training", "validation", "empty", "too_short", "too_long", "excluded_source", "contaminated", "duplicate",
    "near_duplicate", "held_out_copy", "bad_row",
)  # fmt: skip
FATE = {name: number for number, name in enumerate(FATES)}
FIRST_REASON = FATE["empty"]
DROP_REASONS = FATES[FIRST_REASON:]


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to know to do any unit of the work."""

    out: Path
    settings: Settings
    chunks: tuple[Chunk, ...]
    layout: Layout

    def chunk_file(self, number: int) -> Path:
        """Return the path of the arrays that stage 1 makes of a chunk; it also depends on the encoder in use."""
        return work_folder(self.out) / f"chunk-{number:06d}.{'fast' if self.fast_encoder else 'slow'}.npz"

    def chunk_files(self) -> list[Path]:
        return [self.chunk_file(number) for number in range(len(self.chunks))]

    @property
    def mismatch_file(self) -> Path:
        """The file that exists once the fast encoder gave other ids than the tokenizer; it names the text."""
        return work_folder(self.out) / "slow-encoder.txt"

    @property
    def fast_encoder(self) -> bool:
        return not self.mismatch_file.exists()


class Seconds(defaultdict[str, float]):
    """Seconds spent, by activity."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self[name] += time.perf_counter() - begun

    def add(self, spent: Mapping[str, float]) -> None:
        """Add what another timer measured."""
        for name, seconds in spent.items():
            self[name] += seconds

    def total(self) -> float:
        return sum(self.values())

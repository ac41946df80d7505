"""What is to be done, what can become of a row, and what the time went to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.preparation.scratch import work_folder
from data_pipeline.preparation.settings import Settings
from data_pipeline.sources.source import Chunk

# What becomes of a row; those below FIRST_REASON are kept.
FATES = (
    "training", "validation", "empty", "too_short", "too_long", "excluded_source", "contaminated", "duplicate",
    "near_duplicate",
)  # fmt: skip
FATE = {name: number for number, name in enumerate(FATES)}
FIRST_REASON = FATE["empty"]
DROP_REASONS = FATES[FIRST_REASON:]


@dataclass(frozen=True)
class Job:
    """All that a process must know to do any unit of the work."""

    out: Path
    settings: Settings
    chunks: tuple[Chunk, ...]

    def chunk_file(self, number: int) -> Path:
        """Where stage 1 leaves a chunk's arrays; another name once the fast encoder was found wrong."""
        return work_folder(self.out) / f"chunk-{number:06d}.{'fast' if self.fast_encoder else 'slow'}.npz"

    def chunk_files(self) -> list[Path]:
        return [self.chunk_file(number) for number in range(len(self.chunks))]

    @property
    def mismatch_file(self) -> Path:
        """Stands there once the fast encoder has given other ids than the tokenizer, and says for which text."""
        return work_folder(self.out) / "slow-encoder.txt"

    @property
    def fast_encoder(self) -> bool:
        return not self.mismatch_file.exists()


class Seconds(Counter):
    """Seconds by what they went to."""

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self[name] += time.perf_counter() - begun

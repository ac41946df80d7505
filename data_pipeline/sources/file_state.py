"""Notice a file that changes while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.chunk import Chunk
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text


@dataclass(frozen=True)
class FileState:
    """The size of a file and the time when it was last written."""

    file: Path
    size: int
    written_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Return the current state of a file."""
        stat = file.stat()
        return cls(file, stat.st_size, stat.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raise DataError if the file was written, replaced or removed since."""
        try:
            now = FileState.of(self.file)
        except OSError as error:
            raise DataError(
                f"{as_text(self.file)} was removed while it was read: put it back and run again ({error})"
            ) from error
        if now != self:
            raise DataError(
                f"{as_text(self.file)} changed while it was read ({self.size:,} bytes before, {now.size:,} now): wait until "
                "nothing writes to it, delete the unfinished output folder, and run again"
            )


@dataclass(frozen=True)
class FileChunk:
    """A chunk of a file. Reading it fails if the file has changed since the source was opened."""

    chunk: Chunk
    state: FileState

    @property
    def rows(self) -> int | None:
        return self.chunk.rows

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        try:
            yield from self.chunk.frames(layout, bad_rows)
        except DataError:
            self.state.check_unchanged()  # a changed file is the likelier cause
            raise
        self.state.check_unchanged()

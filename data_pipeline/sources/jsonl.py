"""Chunks of JSON-lines files. A chunk is a range of the file's bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources import chunk
from data_pipeline.sources.bad_rows import BadRows, columns_of_rows
from data_pipeline.sources.compression import READ_FAULTS
from data_pipeline.sources.json_rows import parse_row
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.lines import line_ranges, lines_before, lines_of
from data_pipeline.sources.names import as_text
from data_pipeline.sources.rows import Row, frames
from data_pipeline.sources.values import column_of


@dataclass(frozen=True)
class JsonlChunk:
    """The lines of a range of bytes, as `lines_of` divides a file."""

    file: Path
    start: int
    end: int
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        columns = {column_of(field, ()) for field in (*layout.fields, layout.source)}
        keys = [json.dumps(column, ensure_ascii=False).encode() for column in columns]
        yield from frames(self.parsed(keys), layout, as_text(self.file.name), bad_rows)

    def parsed(self, keys: list[bytes]) -> Iterator[Row]:
        """Yield every row, or why it cannot be read, and its name. keys: quoted names that must not occur twice in a row."""
        number = 0
        try:
            for number, line in enumerate(lines_of(self.file, self.start, self.end), 1):
                if not line.isspace():
                    yield parse_row(line, keys), partial(self._name, number)
        except READ_FAULTS as error:
            raise DataError(
                f"{as_text(self.file)} cannot be read after line {self._lines_before() + number}: download it again or "
                f"leave it out ({error})"
            ) from error

    def _name(self, number: int) -> str:
        return f"{as_text(self.file)}, line {self._lines_before() + number}"

    def _lines_before(self) -> int:
        return lines_before(self.file, self.start)


def jsonl_chunks(file: Path, layout: Layout) -> list[JsonlChunk]:
    """Divide a file into ranges of bytes."""
    return [JsonlChunk(file, start, end) for start, end in line_ranges(file, chunk.BYTES_PER_CHUNK)]


def jsonl_columns(file: Path) -> list[str] | None:
    """Return the keys of a file's first good row, or None if it has no row."""
    return columns_of_rows(JsonlChunk(file, 0, file.stat().st_size).parsed([]))

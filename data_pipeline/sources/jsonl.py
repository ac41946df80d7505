"""Chunks of JSON-lines files. A chunk is a range of bytes; a line belongs to the range in which it begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources import chunk
from data_pipeline.sources.bad_rows import BadRows, columns_of_rows
from data_pipeline.sources.compression import FAULTS, is_compressed, open_bytes
from data_pipeline.sources.file_names import shown
from data_pipeline.sources.json_rows import parse_row
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.rows import Row, frames
from data_pipeline.sources.values import column_of

COPY_BYTES = 2**20


@dataclass(frozen=True)
class JsonlChunk:
    """The lines that begin at or after byte `start` and before byte `end`; for a compressed file, all lines."""

    file: Path
    start: int = 0
    end: int | None = None
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        columns = {column_of(field, ()) for field in (*layout.fields, layout.source)}
        keys = [json.dumps(column, ensure_ascii=False).encode() for column in columns]
        yield from frames(self.parsed(keys), layout, shown(self.file.name), bad_rows)

    def parsed(self, keys: list[bytes]) -> Iterator[Row]:
        """Yield every row, or why it cannot be read, and its name. keys: quoted names that must not occur twice in a row."""
        number = 0
        try:
            with open_bytes(self.file) as lines:
                if self.start:
                    lines.seek(self.start - 1)
                    lines.readline()  # the rest of the line that began earlier, if any
                position = lines.tell()
                while self.end is None or position < self.end:
                    line = lines.readline()
                    if not line:
                        break
                    number += 1
                    if line.strip():
                        yield parse_row(line, keys), partial(self._where, number)
                    position += len(line)
        except FAULTS as error:
            raise DataError(
                f"{shown(self.file)} cannot be read after line {self._lines_before() + number}: download it again or leave it "
                f"out ({error})"
            ) from error

    def _where(self, number: int) -> str:
        # Counting the lines before requires reading them, so it is done only for an error.
        return f"{shown(self.file)}, line {self._lines_before() + number}"

    def _lines_before(self) -> int:
        if not self.start:
            return 0
        with self.file.open("rb") as file:
            return _newlines(file, self.start) + (0 if _byte_before(file, self.start) == b"\n" else 1)


def jsonl_chunks(file: Path, layout: Layout) -> list[JsonlChunk]:
    """Divide a file into ranges of bytes. A compressed file is one chunk, because it is readable only from its start."""
    if is_compressed(file):
        return [JsonlChunk(file)]
    size, step = file.stat().st_size, chunk.BYTES_PER_CHUNK
    return [JsonlChunk(file, start, min(start + step, size)) for start in range(0, size, step)]


def jsonl_columns(file: Path) -> list[str] | None:
    """Return the keys of a file's first good row, or None if it has no row."""
    return columns_of_rows(JsonlChunk(file).parsed([]))


def _newlines(file: BinaryIO, end: int) -> int:
    file.seek(0)
    count = 0
    while (left := end - file.tell()) > 0:
        count += file.read(min(COPY_BYTES, left)).count(b"\n")
    return count


def _byte_before(file: BinaryIO, position: int) -> bytes:
    file.seek(position - 1)
    return file.read(1)

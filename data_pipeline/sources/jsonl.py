"""Chunks of JSON-lines files. A chunk is a range of bytes; a line belongs to the range in which it begins."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.rows import frames, values_of

BYTES_PER_CHUNK = 2**23
COPY_BYTES = 2**20


@dataclass(frozen=True)
class JsonlChunk:
    """The lines that begin at or after byte `start` and before byte `end`; for a gzip file, all lines."""

    file: Path
    start: int = 0
    end: int | None = None
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout) -> Iterator[pl.DataFrame]:
        yield from frames(self._rows(partial(values_of, layout=layout, default_source=self.file.name)), layout)

    def _rows(self, values: Callable[[dict, str], dict]) -> Iterator[dict]:
        number = 0
        try:
            with gzip.open(self.file) if self.file.suffix.lower() == ".gz" else self.file.open("rb") as lines:
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
                        yield self._row(line, number, values)
                    position += len(line)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self.file} cannot be read after line {self._lines_before() + number}: download it again or leave it out "
                f"({error})"
            ) from error

    def _row(self, line: bytes, number: int, values: Callable[[dict, str], dict]) -> dict:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError("{where} is not a JSON object: every line must hold one row")
            return values(row, "{where},")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._where(number)} is not valid JSON: correct or remove it ({error})") from error
        except DataError as error:
            # The line number is filled in only for an error, because it requires reading everything before this chunk.
            raise DataError(str(error).replace("{where}", self._where(number))) from error

    def _where(self, number: int) -> str:
        return f"{self.file}, line {self._lines_before() + number}"

    def _lines_before(self) -> int:
        if not self.start:
            return 0
        with self.file.open("rb") as file:
            return _newlines(file, self.start) + (0 if _byte_before(file, self.start) == b"\n" else 1)


def jsonl_chunks(file: Path) -> list[JsonlChunk]:
    """Divide a file into ranges of bytes. A compressed file is one chunk, because it is readable only from its start."""
    if file.suffix.lower() == ".gz":
        return [JsonlChunk(file)]
    size = file.stat().st_size
    return [JsonlChunk(file, start, min(start + BYTES_PER_CHUNK, size)) for start in range(0, size, BYTES_PER_CHUNK)]


def jsonl_columns(file: Path) -> list[str] | None:
    """Return the keys of a file's first row, or None if it has no row."""
    return next(JsonlChunk(file)._rows(lambda row, where: list(row)), None)


def _newlines(file: BinaryIO, end: int) -> int:
    file.seek(0)
    count = 0
    while (left := end - file.tell()) > 0:
        count += file.read(min(COPY_BYTES, left)).count(b"\n")
    return count


def _byte_before(file: BinaryIO, position: int) -> bytes:
    file.seek(position - 1)
    return file.read(1)

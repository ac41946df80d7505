"""Rows of a JSON file: a list of objects, or one object in each line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows, columns_of_rows
from data_pipeline.sources.chunk import Chunk
from data_pipeline.sources.compression import READ_FAULTS, open_bytes
from data_pipeline.sources.json_rows import loads, row_of
from data_pipeline.sources.jsonl import jsonl_chunks, jsonl_columns
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.rows import Row, frames

BEGINNING = 4096  # bytes in which a list has to begin


@dataclass(frozen=True)
class JsonChunk:
    """All rows of a file that holds a list. It is read into memory as a whole."""

    file: Path
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        yield from frames(_rows(self.file), layout, as_text(self.file.name), bad_rows)


def json_chunks(file: Path, layout: Layout) -> Sequence[Chunk]:
    """Return one chunk for a list, or ranges of lines."""
    return [JsonChunk(file)] if _is_list(file) else jsonl_chunks(file, layout)


def json_columns(file: Path) -> list[str] | None:
    """Return the keys of a file's first good row, or None if it has no row."""
    return columns_of_rows(_rows(file)) if _is_list(file) else jsonl_columns(file)


def _rows(file: Path) -> Iterator[Row]:
    for number, row in enumerate(_list(file), 1):
        yield row_of(row), partial("{}, row {}".format, as_text(file), number)


def _is_list(file: Path) -> bool:
    try:
        with open_bytes(file) as content:
            return content.read(BEGINNING).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except READ_FAULTS as error:
        raise _unreadable(file, error) from error


def _list(file: Path) -> list:
    try:
        with open_bytes(file) as content:
            values = loads(content.read().removeprefix(b"\xef\xbb\xbf"))
    except (*READ_FAULTS, ValueError) as error:
        raise _unreadable(file, error) from error
    assert isinstance(values, list)  # it begins with a bracket
    return values


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{as_text(file)} is not a valid list of JSON objects: download it again or leave it out ({error})"
    )

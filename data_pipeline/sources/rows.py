"""What a row must be, wherever it comes from: question, answer and source, each a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import polars as pl

from data_pipeline.errors import DataError

REQUIRED_COLUMNS = ("question", "answer")
COLUMNS = ("question", "answer", "source")
ROWS_PER_FRAME = 8192  # what is held in memory as text at a time,
BYTES_PER_FRAME = 2**24  # or as much, about, where rows are long


def require_columns(found: Iterable[str], where: str) -> None:
    """Raise DataError where a required column is missing."""
    missing = [column for column in REQUIRED_COLUMNS if column not in found]
    if missing:
        raise DataError(
            f"{where} has no column {' and no column '.join(missing)}: it has {', '.join(found) or 'none'}, "
            f"and {' and '.join(REQUIRED_COLUMNS)} are required"
        )


def values_of(row: dict, where: str, default_source: str) -> dict[str, str]:
    """Pick the three columns of one row; raises DataError where one is missing or is no text."""
    require_columns(row, where)
    values = {column: row[column] for column in REQUIRED_COLUMNS} | {"source": row.get("source", default_source)}
    for column, value in values.items():
        if value is None:
            values[column] = ""
        elif not isinstance(value, str):
            raise DataError(f"{where} holds a {type(value).__name__} as {column}, not text: make it a string")
        elif not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise DataError(f"{where} has half a surrogate pair in its {column}, which is no character: remove it")
    return values


def frames(values: Iterator[dict[str, str]]) -> Iterator[pl.DataFrame]:
    """Put rows into frames of ROWS_PER_FRAME rows, or of fewer long ones."""
    batch, size = [], 0
    for row in values:
        batch.append(row)
        size += sum(map(len, row.values()))
        if len(batch) >= ROWS_PER_FRAME or size >= BYTES_PER_FRAME:
            yield _frame(batch)
            batch, size = [], 0
    if batch:
        yield _frame(batch)


def _frame(rows: list[dict[str, str]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(COLUMNS, pl.String))


def empty_frame() -> pl.DataFrame:
    """A frame without rows."""
    return pl.DataFrame(schema=dict.fromkeys(COLUMNS, pl.String))

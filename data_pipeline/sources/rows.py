"""The common form of rows from any source: the texts question, answer and source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import polars as pl

from data_pipeline.errors import DataError

REQUIRED_COLUMNS = ("question", "answer")
COLUMNS = ("question", "answer", "source")
# Text in memory at a time: this many rows, or about this many bytes if the rows are long.
ROWS_PER_FRAME = 8192
BYTES_PER_FRAME = 2**24


def require_columns(found: Iterable[str], where: str) -> None:
    """Raise DataError if a required column is missing."""
    missing = [column for column in REQUIRED_COLUMNS if column not in found]
    if missing:
        raise DataError(
            f"{where} has no column {' and no column '.join(missing)}: it has {', '.join(found) or 'none'}, "
            f"and {' and '.join(REQUIRED_COLUMNS)} are required"
        )


def values_of(row: dict, where: str, default_source: str) -> dict[str, str]:
    """Return the three columns of one row. Raises DataError if one is missing or is not text."""
    require_columns(row, where)
    values = {column: row[column] for column in REQUIRED_COLUMNS} | {"source": row.get("source", default_source)}
    for column, value in values.items():
        if value is None:
            values[column] = ""
        elif not isinstance(value, str):
            raise DataError(f"{where} has {column} of type {type(value).__name__}, not text: make it a string")
        elif not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise DataError(f"{where} has half a surrogate pair in its {column}, which is not a character: remove it")
    return values


def frames(values: Iterator[dict[str, str]]) -> Iterator[pl.DataFrame]:
    """Collect rows into frames of ROWS_PER_FRAME rows, or fewer if the rows are long."""
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
    """Return a frame without rows."""
    return pl.DataFrame(schema=dict.fromkeys(COLUMNS, pl.String))

"""Values of single fields as text."""

from __future__ import annotations

import re
from collections.abc import Collection

from data_pipeline.sources.bad_rows import BadRowError

HALF_A_PAIR = re.compile("[\ud800-\udfff]")


def text_of(value: object, name: str) -> str:
    """Return a value as text: numbers as they are written, `true` and `false`, and an empty text for a missing value.

    name: of the field, for errors. Raises BadRowError for lists and objects, and for half a surrogate pair.
    """
    if isinstance(value, str):
        if not value.isascii() and HALF_A_PAIR.search(value):
            raise BadRowError("half a surrogate pair", f"{name} has half a surrogate pair, which is not a character")
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    raise BadRowError(f"{name} is no text", f"{name} is of type {type(value).__name__}, not text")


def column_of(field: str, columns: Collection[str]) -> str:
    """Return the column that a field is in: the field itself, or what is before its first dot (`translation.de`)."""
    return field if field in columns else field.partition(".")[0]


def value_at(row: dict, field: str) -> object:
    """Return the value of a field of a row, or None if there is none."""
    column = column_of(field, row)
    value = row.get(column)
    for name in field[len(column) + 1 :].split(".") if field != column else []:
        value = value.get(name) if isinstance(value, dict) else None
    return value

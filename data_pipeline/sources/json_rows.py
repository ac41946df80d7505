"""Rows from JSON text."""

from __future__ import annotations

import json
from collections.abc import Iterable

from data_pipeline.sources.bad_rows import BadRowError


def parse_row(text: bytes, keys: Iterable[bytes]) -> dict | BadRowError:
    """Parse a row, or return why that is not possible. keys: quoted names that must not occur twice in the row."""
    try:
        row = json.loads(text)
        # A second look costs time, so only rows that might have a key twice get one.
        if any(text.count(key) > 1 for key in keys):
            json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        return BadRowError("nested too deeply", "it is nested too deeply to be read")
    except BadRowError as error:
        return error
    except ValueError as error:
        return BadRowError("not valid JSON", f"it is not valid JSON ({error})")
    return row_of(row)


def row_of(value: object) -> dict | BadRowError:
    """Return a parsed row, or why it is none."""
    if not isinstance(value, dict):
        return BadRowError("not a JSON object", f"it is not a JSON object, but of type {type(value).__name__}")
    return value


def _without_repetition(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRowError("a key twice", f"it has the key {twice} twice")
    return row

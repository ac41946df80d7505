"""Rows from JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json  # several times as fast as Python's own parser

from data_pipeline.sources.bad_rows import BadRowError

# Values below this depth are not kept. No column of text is so deep, and Python's parser refuses about 1,000 levels.
DEEPEST = 100
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def parse_row(text: bytes, keys: Iterable[bytes]) -> dict | BadRowError:
    """Parse a row, or return why that is not possible. keys: quoted names that must not occur twice in the row."""
    try:
        try:
            row = from_json(text, cache_strings="keys")
        except ValueError:  # deep nesting, half a surrogate pair, or a fault, which Python's own parser explains
            row = loads(text)
        # A second look costs time, so only rows that might have a key twice get one.
        # Space between a key and its colon would hide the key from the count.
        is_plain = isinstance(row, dict) and text.count(b'":') == len(row) and b'" ' not in text and b'"\t' not in text
        if not is_plain and any(text.count(key) > 1 for key in keys):
            loads(text, object_pairs_hook=without_repetition)
    except BadRowError as error:
        return error
    except ValueError as error:
        return BadRowError("not valid JSON", f"it is not valid JSON ({error})")
    return row_of(row)


def loads(text: str | bytes, **options: Any) -> object:
    """Decode a JSON text. Raises ValueError if it is not valid."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        return json.loads(_shallow(text if isinstance(text, str) else text.decode()), **options)


def _shallow(text: str) -> str:
    """Replace the arrays and objects below DEEPEST by null."""
    parts, depth, kept_to = [], 0, 0
    for token in TOKENS.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth == DEEPEST + 1:
                parts.append(text[kept_to : token.start()])
        elif token[0] in "]}":
            if depth == DEEPEST + 1:
                parts.append("null")
                kept_to = token.end()
            depth -= 1
    return "".join(parts if depth > DEEPEST else [*parts, text[kept_to:]])


def end_of_value(text: str, start: int) -> int | None:
    """Return the end of the array or object that begins at `start`, or None if the text ends before."""
    depth = 0
    for token in TOKENS.finditer(text, start):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth == 0:
            return token.end()
    return None


def row_of(value: object) -> dict | BadRowError:
    """Return a parsed row, or why it is none. A fault that was found before is passed on."""
    if isinstance(value, BadRowError):
        return value
    if not isinstance(value, dict):
        return BadRowError("not a JSON object", f"it is not a JSON object, but of type {type(value).__name__}")
    return value


def without_repetition(pairs: list[tuple[str, object]]) -> dict:
    """Make an object of its pairs; an `object_pairs_hook`. Raises BadRowError if a key occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRowError("a key twice", f"it has the key {twice} twice")
    return row

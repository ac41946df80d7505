"""Changing only some rows of a column, so that the other rows cost nothing."""

from collections.abc import Callable

import polars as pl


def map_rows(texts: pl.Series, rows: pl.Series, function: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Apply a function to the rows with these numbers."""
    if rows.is_empty():
        return texts
    if len(rows) == len(texts):
        return function(texts)
    return texts.clone().scatter(rows, function(texts.gather(rows)))  # cloned, because scatter modifies its series


def replace_matches(texts: pl.Series, pattern: str, replacement: str) -> pl.Series:
    """Replace all matches of a pattern; texts without a match are searched but not copied."""
    rows = texts.str.contains(pattern).arg_true()
    return map_rows(texts, rows, lambda matching: matching.str.replace_all(pattern, replacement))

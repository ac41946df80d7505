"""Cleaning of white space: one kind of line break, single spaces, no trailing spaces, at most one blank line in a row.

The indentation of lines stays, because code and nested lists need it. Runs of spaces inside code, formulas and tables stay as
well; `protection.py` takes them out of the text before these functions see it.
"""

import polars as pl

from data_pipeline.cleaning.rows import map_rows, replace_matches

_LINE_BREAK = r"\r\n?|[\x0b\x0c\x85\u2028\u2029]"
_SPACES_BEYOND_ASCII = r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"
_ENDS = r"\A[ \n]|[ \n]\z"
# One space at the start of a line counts as untidy. Deeper indentation does not, and is kept.
UNTIDY_WHITESPACE = rf"[\t\r\x0b\x0c\x85\u2028\u2029]|{_SPACES_BEYOND_ASCII}|[^\n ]  | \n|\n [^ ]|\n\n\n|{_ENDS}"
UNTIDY_WHITESPACE_OR_NEWLINE = rf"\n|  |{UNTIDY_WHITESPACE}"

_SPACES_WITHIN_A_LINE = r"(\A +|\n[ \t]+)|( ) +"  # the first group is the indentation


def unify_line_breaks(texts: pl.Series) -> pl.Series:
    """Replace every kind of line break with a newline."""
    return replace_matches(texts, _LINE_BREAK, "\n")


def normalize_whitespace(texts: pl.Series) -> pl.Series:
    """Collapse runs of spaces within lines, remove trailing spaces, and keep at most one blank line in a row.

    Indentation stays if any line but the first is indented by a tab or by two spaces or more. Otherwise it shows no
    structure and is removed.
    """
    texts = _only_ascii_spaces(texts)
    texts = map_rows(texts, texts.str.contains("\t", literal=True).arg_true(), _without_inner_tabs)
    # The ends first: what is indented there must not decide about the rest.
    lines = pl.col("text").str.strip_chars_end(" \t\n").str.replace_all(" +\n", "\n").str.strip_chars_start("\n")
    lines = lines.str.replace_all("\n\n\n+", "\n\n")
    texts = texts.to_frame("text").select(lines).to_series()
    indented = texts.str.contains("\n  ", literal=True) | texts.str.contains("\n\t", literal=True)
    texts = map_rows(texts, indented.arg_true(), _normalize_indented)
    return map_rows(texts, (~indented).arg_true(), _normalize_flat)


def to_one_line(texts: pl.Series) -> pl.Series:
    """Replace every run of white space with one space, also in code and tables."""
    texts = _only_ascii_spaces(replace_matches(unify_line_breaks(texts), "[\n\t]", " "))
    return replace_matches(texts, "  +", " ").str.strip_chars(" ")


def _only_ascii_spaces(texts: pl.Series) -> pl.Series:
    # Searching for many characters is slow, so only the few texts with non-ASCII characters are searched.
    beyond_ascii = (texts.str.len_bytes() != texts.str.len_chars()).arg_true()
    return map_rows(texts, beyond_ascii, lambda some: replace_matches(some, _SPACES_BEYOND_ASCII, " "))


def _without_inner_tabs(texts: pl.Series) -> pl.Series:
    """Replace tabs with spaces, except in the indentation of lines."""
    return pl.Series(["\n".join(map(_with_spaces_for_tabs, text.split("\n"))) for text in texts], dtype=pl.String)


def _with_spaces_for_tabs(line: str) -> str:
    line = line.rstrip(" \t")
    content = line.lstrip(" \t")
    return line[: len(line) - len(content)] + content.replace("\t", " ")


def _normalize_indented(texts: pl.Series) -> pl.Series:
    return texts.str.replace_all(_SPACES_WITHIN_A_LINE, "$1$2")


def _normalize_flat(texts: pl.Series) -> pl.Series:
    text = pl.col("text").str.replace_all("  +", " ").str.replace_all("\n ", "\n").str.strip_chars(" \t\n")
    return texts.to_frame("text").select(text).to_series()

"""Text cleaning: one named polars expression per rule, the same for a corpus and for one prompt.

Every rule leaves mathematics alone: LaTeX, `a < b` and `x<y>z` come out byte for byte as they went in. The rules
together are idempotent: cleaning what is clean changes nothing.
"""

import re
import unicodedata
from collections.abc import Callable
from html import unescape
from html.entities import html5

import polars as pl

# Line and page separators are not in here: they are white space, and removing them would glue words together.
CONTROL_CHARACTERS = (
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # C0 and C1
    r"\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"  # soft hyphen, zero-width, bidi marks, BOM
)
LINE_BREAKS = r"\r\n?|[\x0b\x0c\x85\u2028\u2029]"
HORIZONTAL_SPACE = r"[ \t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"
# Only references that end in `;`: without it `&parameter` in source code would become `¶meter`.
ENTITY = r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"

URL_CHARACTER = r"[^\s<>\"`()\[\]{}|\\^]"
URL_LAST_CHARACTER = r"[^\s<>\"`()\[\]{}|\\^.,;:!?'*]"
IN_PARENTHESES = rf"\({URL_CHARACTER}*\)"  # .../wiki/Ring_(mathematics)
URL = (
    rf"(?:(?:https?|ftp)://|\bwww\.)(?:{URL_CHARACTER}|{IN_PARENTHESES})*"
    rf"(?:{URL_LAST_CHARACTER}|{IN_PARENTHESES})"
)
MAY_HOLD_URL = r"(?i)(?:https?|ftp)://|www\."

_CONTROL_CHARACTERS = re.compile(CONTROL_CHARACTERS)
_ENTITY = re.compile(ENTITY)
_REPEATED_AMPERSAND = re.compile(r"&(?:amp;)+")
_MARKDOWN_LINK = re.compile(rf"!?\[([^\[\]]*)\]\(\s*<?{URL}>?(?:\s+[\"'][^\"'\n]*[\"'])?\s*\)", re.IGNORECASE)
_URL_AND_BRACKETS = re.compile(
    rf"[ \t]?(?:\(\s*{URL}\s*\)|\[\s*{URL}\s*\]|<\s*{URL}\s*>|{URL})",
    re.IGNORECASE,
)


def remove_control_characters(text: pl.Expr) -> pl.Expr:
    """Removes C0 and C1 controls, zero-width characters, soft hyphens, byte order marks and direction marks."""
    return text.str.replace_all(CONTROL_CHARACTERS, "")


def normalize_unicode(text: pl.Expr) -> pl.Expr:
    """Composes characters (NFC); compatibility forms such as the 2 of x² stay."""
    return text.str.normalize("NFC")


def unescape_html(text: pl.Expr) -> pl.Expr:
    """Replaces HTML character references by their characters, also those escaped several times."""
    return _map_matching_rows(text, ENTITY, _unescape_text)


def remove_urls(text: pl.Expr) -> pl.Expr:
    """Removes URLs and the brackets that held nothing else; of a markdown link `[text](url)` the text stays."""
    return _map_matching_rows(text, MAY_HOLD_URL, _remove_urls_from_text)


def normalize_whitespace(text: pl.Expr) -> pl.Expr:
    """Makes runs of spaces one space, strips every line, and allows one blank line at most; newlines stay."""
    return (
        text.str.replace_all(LINE_BREAKS, "\n")
        .str.replace_all(HORIZONTAL_SPACE + "{2,}", " ")
        .str.replace_all(HORIZONTAL_SPACE, " ")
        .str.replace_all(" ?\n ?", "\n")
        .str.replace_all("\n{3,}", "\n\n")
        .str.strip_chars(" \n")
    )


RULES: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "remove_control_characters": remove_control_characters,
    "normalize_unicode": normalize_unicode,  # before the next, because NFC makes `;` and `K` of their look-alikes
    "unescape_html": unescape_html,
    "remove_urls": remove_urls,
    "normalize_whitespace": normalize_whitespace,
}


def clean(text: pl.Expr) -> pl.Expr:
    """Applies all rules, in order, to a string column."""
    for rule in RULES.values():
        text = rule(text)
    return text


def clean_text(text: str) -> str:
    """Applies all rules to one string, by the same expressions as a corpus."""
    return pl.DataFrame({"text": [text]}, schema={"text": pl.String}).select(clean(pl.col("text"))).item()


def _map_matching_rows(text: pl.Expr, pattern: str, function: Callable[[str], str]) -> pl.Expr:
    """Maps a Python function over the rows that match a pattern, so that the other rows don't pay for it."""

    def map_batch(column: pl.Series) -> pl.Series:
        rows = column.str.contains(pattern).arg_true()
        if rows.is_empty():
            return column
        changed = pl.Series([function(value) for value in column.gather(rows)], dtype=pl.String)
        return column.scatter(rows, changed)

    return text.map_batches(map_batch, return_dtype=pl.String, is_elementwise=True)


def _character_of(reference: re.Match) -> str:
    entity = reference[0]
    return unescape(entity) if entity[1] == "#" else html5.get(entity[1:], entity)


def _unescape_text(text: str) -> str:
    # A character that appears may itself be a control character or an accent, and what it leaves may be a reference
    # again, so all three rules run until nothing changes.
    while True:
        unescaped = _ENTITY.sub(_character_of, _REPEATED_AMPERSAND.sub("&amp;", text))
        unescaped = unicodedata.normalize("NFC", _CONTROL_CHARACTERS.sub("", unescaped))
        if unescaped == text:
            return text
        text = unescaped


def _remove_urls_from_text(text: str) -> str:
    # Links nest, and the text around a removed URL may form a reference, an accented letter or a URL with what follows.
    while True:
        without, links = _MARKDOWN_LINK.subn(r"\1", text)
        if not links:
            without = _URL_AND_BRACKETS.sub("", text)
        if without == text:
            return text
        text = _unescape_text(without)

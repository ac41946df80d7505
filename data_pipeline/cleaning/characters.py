"""Cleaning of characters: wrong decoding, control characters, normal forms and white space.

Each function takes and returns a series of strings. The pattern that belongs to it matches every text that it would
change.
"""

import re
from collections.abc import Callable
from typing import Literal

import polars as pl

C1_CONTROLS = "\x80-\x84\x86-\x9f"  # without U+0085, which is a line break
# Line and page separators are excluded: they are white space, and removing them would join words.
CONTROL_CHARACTERS = (
    rf"[\x00-\x08\x0e-\x1f\x7f{C1_CONTROLS}"  # C0 and C1
    r"\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"  # soft hyphen, zero-width, bidi marks, BOM
)

# UTF-8 that was read as Windows-1252 or Latin-1: one character for the lead byte and one for each continuation byte.
# - The leads × and Ø are left out, because maths has them before … and ².
# - Punctuation also follows accented letters in correct text (`Poincaré”—`). So punctuation alone counts only after leads
#   that are rare otherwise.
# ftfy makes the final decision.
_SYMBOL = "\x80-\xbf€‚ƒ„†‡ˆ‰Š‹ŒŽ™š›œžŸ˜"
_CONTINUATION = f"[{_SYMBOL}…‘’“”•–—]"
MOJIBAKE = (
    f"[Â-ÖÙ-ß][{_SYMBOL}]|[ÂÃÄÅÎÏÐ][…‘’“”•–—]"
    f"|[à-ï](?:[{_SYMBOL}]{_CONTINUATION}|{_CONTINUATION}[{_SYMBOL}])|[ð-ô]{_CONTINUATION}{{3}}"
    f"|[{C1_CONTROLS}]"  # never written on purpose: Windows-1252 punctuation that was read as Latin-1
)

# Every character that NFC may change: marks are composed and reordered, Hangul vowels and finals are composed, and some
# characters are mere duplicates of others.
NOT_SURELY_NFC = (
    r"[\p{M}\u1160-\u11ff"
    r"\u0374\u037e\u0387\u0958-\u095f\u09dc-\u09df\u0a33-\u0a5e\u0b5c\u0b5d\u0f43-\u0fb9\u1f71-\u1fff\u2000\u2001\u2126"
    r"\u212a\u212b\u2329\u232a\u2adc\uf900-\ufaff\ufb1d-\ufb4f\U0001d15e-\U0001d1c0\U0002f800-\U0002fa1f]"
)
NOT_ASCII = r"[^\x00-\x7f]"
UNUSUAL_CHARACTERS = r"[^\n -~]"  # contains all characters of mojibake, controls and forms other than NFC

_LINE_BREAKS = r"\r\n?|[\x0b\x0c\x85\u2028\u2029]"
_SPACES_BEYOND_ASCII = r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"
_ENDS = r"\A[ \n]|[ \n]\z"
UNTIDY_WHITESPACE = rf"[\t\r\x0b\x0c\x85\u2028\u2029]|{_SPACES_BEYOND_ASCII}|  | \n|\n |\n\n\n|{_ENDS}"
UNTIDY_WHITESPACE_OR_NEWLINE = rf"\n|{UNTIDY_WHITESPACE}"

_MOJIBAKE = re.compile(MOJIBAKE)


def map_rows(texts: pl.Series, rows: pl.Series, function: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Apply a function to the rows with these numbers; the other rows cost nothing."""
    if rows.is_empty():
        return texts
    return texts.clone().scatter(rows, function(texts.gather(rows)))  # cloned, because scatter modifies its series


def replace_matches(texts: pl.Series, pattern: str, replacement: str) -> pl.Series:
    """Replace all matches of a pattern; texts without a match are searched but not copied."""
    rows = texts.str.contains(pattern).arg_true()
    return map_rows(texts, rows, lambda matching: matching.str.replace_all(pattern, replacement))


def fix_mojibake(texts: pl.Series) -> pl.Series:
    """Repair wrongly decoded text: `â€™` becomes `’`, but only if ftfy considers the text as it is unlikely.

    Source: Robyn Speer, ftfy: fixes text for you, https://ftfy.readthedocs.io (only its `fix_encoding`).
    """
    return pl.Series([_fix_mojibake(text) for text in texts], dtype=pl.String)


def remove_control_characters(texts: pl.Series) -> pl.Series:
    """Remove C0 and C1 controls, zero-width characters, soft hyphens, byte order marks and direction marks."""
    return texts.str.replace_all(CONTROL_CHARACTERS, "")


def compose(texts: pl.Series) -> pl.Series:
    """Compose characters (NFC); compatibility forms such as the 2 of x² stay."""
    return texts.str.normalize("NFC")


def compose_compatibly(texts: pl.Series) -> pl.Series:
    """Compose characters and replace compatibility forms (NFKC): ﬁ becomes fi, but x² also becomes x2."""
    return texts.str.normalize("NFKC")


def normalize_whitespace(texts: pl.Series, newlines: Literal["keep", "space"] = "keep") -> pl.Series:
    """Collapse runs of spaces, strip every line, and keep at most one blank line in a row or no newline."""
    texts = replace_matches(texts, _LINE_BREAKS, "\n")
    texts = replace_matches(texts, "\t", " ")
    # Searching for many characters is slow, so only the few texts with non-ASCII characters are searched.
    beyond_ascii = (texts.str.len_bytes() != texts.str.len_chars()).arg_true()
    texts = map_rows(texts, beyond_ascii, lambda some: some.str.replace_all(_SPACES_BEYOND_ASCII, " "))
    if newlines == "space":
        texts = replace_matches(texts, "\n", " ")
    texts = replace_matches(texts, "  +", " ")
    if newlines == "keep":
        texts = replace_matches(texts, " \n ?|\n ", "\n")
        texts = replace_matches(texts, "\n\n\n+", "\n\n")
    return texts.str.strip_chars(" \n")


def _fix_mojibake(text: str) -> str:
    from ftfy import fix_encoding  # imported here, because few corpora need it

    # Line by line, so that mojibake in one line does not affect the maths in another. A character that is already lost
    # stays as it is instead of becoming U+FFFD.
    return "\n".join(
        fix_encoding(line, replace_lossy_sequences=False) if _MOJIBAKE.search(line) else line
        for line in text.split("\n")
    )

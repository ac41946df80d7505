"""Cleaning of characters: wrong decoding, controls, normal forms and white space.

Each function takes and gives a series of strings; its pattern beside it matches all texts that it would change.
"""

import re
from collections.abc import Callable
from typing import Literal

import polars as pl

C1_CONTROLS = "\x80-\x84\x86-\x9f"  # without U+0085, which is a line break
# Line and page separators are not in here: they are white space, and removing them would glue words together.
CONTROL_CHARACTERS = (
    rf"[\x00-\x08\x0e-\x1f\x7f{C1_CONTROLS}"  # C0 and C1
    r"\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"  # soft hyphen, zero-width, bidi marks, BOM
)

# UTF-8 that was read as Windows-1252 or Latin-1: a character for the lead byte and one for each continuation byte. The
# leads × and Ø are left out, because they stand before … and ² in maths; and punctuation alone, which follows accented
# letters in good text (`Poincaré”—`), counts behind leads that little else begins with. ftfy has the last word.
_SYMBOL = "\x80-\xbf€‚ƒ„†‡ˆ‰Š‹ŒŽ™š›œžŸ˜"
_CONTINUATION = f"[{_SYMBOL}…‘’“”•–—]"
MOJIBAKE = (
    f"[Â-ÖÙ-ß][{_SYMBOL}]|[ÂÃÄÅÎÏÐ][…‘’“”•–—]"
    f"|[à-ï](?:[{_SYMBOL}]{_CONTINUATION}|{_CONTINUATION}[{_SYMBOL}])|[ð-ô]{_CONTINUATION}{{3}}"
    f"|[{C1_CONTROLS}]"  # nobody writes these: they are Windows-1252's punctuation, read as Latin-1
)

# All that NFC changes: marks compose and are put in order, vowels and finals of Hangul compose, and some characters
# are only second codes of others.
NOT_SURELY_NFC = (
    r"[\p{M}\u1160-\u11ff"
    r"\u0374\u037e\u0387\u0958-\u095f\u09dc-\u09df\u0a33-\u0a5e\u0b5c\u0b5d\u0f43-\u0fb9\u1f71-\u1fff\u2000\u2001\u2126"
    r"\u212a\u212b\u2329\u232a\u2adc\uf900-\ufaff\ufb1d-\ufb4f\U0001d15e-\U0001d1c0\U0002f800-\U0002fa1f]"
)
NOT_ASCII = r"[^\x00-\x7f]"
UNUSUAL_CHARACTERS = r"[^\n -~]"  # whatever mojibake, control characters and forms other than NFC are made of

_LINE_BREAKS = r"\r\n?|[\x0b\x0c\x85\u2028\u2029]"
_SPACES_BEYOND_ASCII = r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"
_ENDS = r"\A[ \n]|[ \n]\z"
UNTIDY_WHITESPACE = rf"[\t\r\x0b\x0c\x85\u2028\u2029]|{_SPACES_BEYOND_ASCII}|  | \n|\n |\n\n\n|{_ENDS}"
UNTIDY_WHITESPACE_OR_NEWLINE = rf"\n|{UNTIDY_WHITESPACE}"

_MOJIBAKE = re.compile(MOJIBAKE)


def map_rows(texts: pl.Series, rows: pl.Series, function: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Maps a function over the rows of these numbers; the others don't pay for it."""
    if rows.is_empty():
        return texts
    return texts.clone().scatter(rows, function(texts.gather(rows)))  # scatter writes into its own series


def replace_matches(texts: pl.Series, pattern: str, replacement: str) -> pl.Series:
    """Replaces all matches of a pattern; the texts without one cost a search, not a copy."""
    rows = texts.str.contains(pattern).arg_true()
    return map_rows(texts, rows, lambda matching: matching.str.replace_all(pattern, replacement))


def fix_mojibake(texts: pl.Series) -> pl.Series:
    """Decodes again what was decoded wrongly: `â€™` becomes `’`, only where ftfy finds the text unlikely as it stands.

    Source: Robyn Speer, ftfy: fixes text for you, https://ftfy.readthedocs.io (its `fix_encoding` alone).
    """
    return pl.Series([_fix_mojibake(text) for text in texts], dtype=pl.String)


def remove_control_characters(texts: pl.Series) -> pl.Series:
    """Removes C0 and C1 controls, zero-width characters, soft hyphens, byte order marks and direction marks."""
    return texts.str.replace_all(CONTROL_CHARACTERS, "")


def compose(texts: pl.Series) -> pl.Series:
    """Composes characters (NFC); compatibility forms such as the 2 of x² stay."""
    return texts.str.normalize("NFC")


def compose_compatibly(texts: pl.Series) -> pl.Series:
    """Composes characters and replaces compatibility forms (NFKC): ﬁ becomes fi, but x² becomes x2 as well."""
    return texts.str.normalize("NFKC")


def normalize_whitespace(texts: pl.Series, newlines: Literal["keep", "space"] = "keep") -> pl.Series:
    """Makes runs of spaces one space, strips every line, and allows one blank line at most or no newline at all."""
    texts = replace_matches(texts, _LINE_BREAKS, "\n")
    texts = replace_matches(texts, "\t", " ")
    # Searching few texts for many characters is far quicker than searching all.
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
    from ftfy import fix_encoding  # few corpora need it

    # Line by line, so that mojibake in one line casts no doubt on the maths in another. A character that is lost
    # already stays as it is instead of becoming U+FFFD.
    return "\n".join(
        fix_encoding(line, replace_lossy_sequences=False) if _MOJIBAKE.search(line) else line
        for line in text.split("\n")
    )

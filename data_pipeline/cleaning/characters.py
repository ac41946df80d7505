"""Cleaning of characters: wrong decoding, control characters and normal forms.

Each function takes and returns a series of strings. The pattern that belongs to it matches every text that it would
change.
"""

import re

import polars as pl

C1_CONTROLS = "\x80-\x84\x86-\x9f"  # without U+0085, which is a line break
# Line and page separators are excluded: they are white space, and removing them would join words.
CONTROL_CHARACTERS = (
    rf"[\x00-\x08\x0e-\x1f\x7f{C1_CONTROLS}"  # C0 and C1
    r"\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"  # soft hyphen, zero-width, bidi marks, BOM
)

# Correct text has joiners and non-joiners after Arabic and Indic letters, which they shape, and joiners between emoji.
_SHAPED_LETTERS = r"\p{Arabic}\p{Syriac}\p{Mongolian}\u0900-\u0dff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\ua840-\ua9ff"
_EMOJI = r"\u00a9\u00ae\u2190-\u21ff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff"
_KEPT_OR_CONTROL = (
    rf"([{_SHAPED_LETTERS}][\u200c\u200d]|[{_EMOJI}]\ufe0f?(?:\u200d[{_EMOJI}]\ufe0f?)+|[\u1820-\u18aa]\u180e)"
    rf"|{CONTROL_CHARACTERS}"
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

# Pairs that look like mojibake, but are an accented letter and a sign in correct text. ftfy decides by the bytes alone.
# - A unit or a variable with an exponent: 160.2 Å³.
# - The last letter of a word in capitals, and the punctuation after it: “MANHÃ”. With Â the sign can be real: WINDOWSÂ®.
_LETTER = r"[^\W\d_]"
_CORRECT_PAIRS = (
    rf"(?:(?<!{_LETTER}[ÄÅÇÉÊËÖÜ])(?<=[ÄÅÇÉÊËÖÜ])(?=[¹²³°±·˜×](?!{_LETTER}))"
    rf"|(?<=[A-ZÀ-ÖØ-Þ][ÀÁÃ-ÖØ-Þ])(?=[¹²³®™©ªº”“’‘»›…–—•](?!{_LETTER})))"
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

_MOJIBAKE = re.compile(MOJIBAKE)
_BETWEEN_A_CORRECT_PAIR = re.compile(_CORRECT_PAIRS)


def fix_mojibake(texts: pl.Series) -> pl.Series:
    """Repair wrongly decoded text: `â€™` becomes `’`, but only if ftfy considers the text as it is unlikely.

    Source: Robyn Speer, ftfy: fixes text for you, https://ftfy.readthedocs.io (only its `fix_encoding`).
    """
    return pl.Series([_fix_mojibake(text) for text in texts], dtype=pl.String)


def remove_control_characters(texts: pl.Series) -> pl.Series:
    """Remove C0 and C1 controls, zero-width characters, soft hyphens, byte order marks and direction marks.

    Joiners and non-joiners stay after the letters that they shape, and joiners stay between emoji.
    """
    return texts.str.replace_all(_KEPT_OR_CONTROL, "$1")


def compose(texts: pl.Series) -> pl.Series:
    """Compose characters (NFC); compatibility forms such as the 2 of x² stay."""
    return texts.str.normalize("NFC")


def compose_compatibly(texts: pl.Series) -> pl.Series:
    """Compose characters and replace compatibility forms (NFKC): ﬁ becomes fi, but x² also becomes x2."""
    return texts.str.normalize("NFKC")


def _fix_mojibake(text: str) -> str:
    # Line by line, so that mojibake in one line does not affect the maths in another.
    return "\n".join(
        line if line.isascii() or not _MOJIBAKE.search(line) else _fix_line(line) for line in text.split("\n")
    )


def _fix_line(line: str) -> str:
    from ftfy import fix_encoding  # imported here, because few corpora need it

    # A character that is already lost stays as it is instead of becoming U+FFFD.
    return "".join(
        fix_encoding(part, replace_lossy_sequences=False) if _MOJIBAKE.search(part) else part
        for part in _BETWEEN_A_CORRECT_PAIR.split(line)
    )

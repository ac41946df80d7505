"""Cleaning of HTML character references."""

import re
from html import unescape
from html.entities import html5

import polars as pl

# Only references that end in `;`: otherwise `&parameter` in source code would become `¶meter`.
ENTITY = r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"
_ENTITY = re.compile(ENTITY)
_REPEATED_AMPERSAND = re.compile(r"&(?:amp;)+")
# A text that explains references names them: there, a reference that stands alone or in quotes stays.
_ABOUT_REFERENCES = re.compile(
    r"\bx?html5? (?:entit|code|character|escap|special)|\b(?:character|entity) references?\b"
    r"|\b(?:html|xml|named|numeric) entit|\bentit(?:y|ies) (?:[\"'“‘(]?&|for|like|such)|non-?breaking space"
    r"|\bescap(?:e|ed|ing) (?:html|xml|sequence|as|it|them|the|character)|\b(?:in|of|for) (?:x?html|xml)\b"
)
_WORDS_ABOUT_REFERENCES = ("html", "xml", "reference", "entit", "breaking space", "escap")
_NAMED_REFERENCE = re.compile(rf"(?<![^\s\"'“‘(\[]){ENTITY}(?![^\s\"'”’)\],.;:?!])")
# In LaTeX, `&` separates columns. So only the references that escaping itself makes are resolved there.
_ESCAPED = re.compile(r"&(?:amp;)*(lt|gt|quot|apos|nbsp|amp|#39|#34|#60|#62|#38|#x27);")
_VERBATIM = (r"\begin{verbatim", r"\begin{lstlisting", r"\begin{minted")
FORMULA = ("$", "\\")


def unescape_html(texts: pl.Series) -> pl.Series:
    """Replace HTML character references with their characters, including references escaped several times."""
    return pl.Series([_unescape(text) for text in texts], dtype=pl.String)


def unescape_in_formula(formula: str) -> str:
    """Replace the references that escaping makes: in `a &amp; b`, the `&` is part of the LaTeX."""
    if "&" not in formula or formula.startswith(_VERBATIM):
        return formula
    return _ESCAPED.sub(_escaped_character, formula)


def _unescape(text: str) -> str:
    lower = text.lower()
    if any(word in lower for word in _WORDS_ABOUT_REFERENCES) and _ABOUT_REFERENCES.search(lower):
        return _unescape_all_but(_NAMED_REFERENCE, text)
    while True:
        unescaped = _ENTITY.sub(_character_of, _REPEATED_AMPERSAND.sub("&amp;", text))
        if unescaped == text:
            return text
        text = unescaped


def _unescape_all_but(kept: re.Pattern, text: str) -> str:
    pieces, position = [], 0
    for found in kept.finditer(text):
        pieces += [_ENTITY.sub(_character_of, text[position : found.start()]), found[0]]
        position = found.end()
    return "".join(pieces) + _ENTITY.sub(_character_of, text[position:])


def _escaped_character(reference: re.Match) -> str:
    return unescape(f"&{reference[1]};")


def _character_of(reference: re.Match) -> str:
    entity = reference[0]
    return unescape(entity) if entity[1] == "#" else html5.get(entity[1:], entity)

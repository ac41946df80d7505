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
_ABOUT_REFERENCES = (  # a pattern of polars, for texts in lower case
    r"(?-u:\b)x?html5? (?:entit|code|character|escap|special)|(?-u:\b)(?:character|entity) references?(?-u:\b)"
    r"|(?-u:\b)(?:html|xml|named|numeric) entit|(?-u:\b)entit(?:y|ies) (?:[\"'“‘(]?&|for|like|such)|non-?breaking space"
    r"|(?-u:\b)escap(?:e|ed|ing) (?:html|xml|sequence|as|it|them|the|character)|(?-u:\b)(?:in|of|for) (?:x?html|xml)(?-u:\b)"
)
_NAMED_REFERENCE = re.compile(rf"(?<![^\s\"'“‘(\[]){ENTITY}(?![^\s\"'”’)\],.;:?!])")
# In LaTeX, `&` separates columns. So only the references that escaping itself makes are resolved there.
_ESCAPED = re.compile(r"&(?:amp;)*(lt|gt|quot|apos|nbsp|amp|#39|#34|#60|#62|#38|#x27);")
_VERBATIM = (r"\begin{verbatim", r"\begin{lstlisting", r"\begin{minted")
FORMULA = ("$", "\\")


def unescape_html(texts: pl.Series) -> pl.Series:
    """Replace HTML character references with their characters, including references escaped several times."""
    about_references = texts.str.to_lowercase().str.contains(_ABOUT_REFERENCES)
    unescaped = [
        _unescape_all_but(_NAMED_REFERENCE, text) if is_about_references else _unescape(text)
        for text, is_about_references in zip(texts.to_list(), about_references.to_list(), strict=True)
    ]
    return pl.Series(unescaped, dtype=pl.String)


def unescape_in_formula(formula: str) -> str:
    """Replace the references that escaping makes: in `a &amp; b`, the `&` is part of the LaTeX."""
    if "&" not in formula or formula.startswith(_VERBATIM):
        return formula
    return _ESCAPED.sub(_escaped_character, formula)


def _unescape(text: str) -> str:
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

"""Cleaning of markup: HTML character references, HTML tags and URLs; mathematics and code stay.

Each function takes and gives a series of strings; its pattern beside it matches all texts that it would change.
"""

import re
from html import unescape
from html.entities import html5

import polars as pl

from data_pipeline.cleaning.characters import replace_matches

# Only references that end in `;`: without it `&parameter` in source code would become `¶meter`.
ENTITY = r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"
_ENTITY = re.compile(ENTITY)
_REPEATED_AMPERSAND = re.compile(r"&(?:amp;)+")

URL_CHARACTER = r"[^\s<>\"`()\[\]{}|\\^]"
URL_LAST_CHARACTER = r"[^\s<>\"`()\[\]{}|\\^.,;:!?'*]"
IN_PARENTHESES = rf"\({URL_CHARACTER}*\)"  # .../wiki/Ring_(mathematics)
URL = (
    rf"(?:(?:https?|ftp)://|\bwww\.)(?:{URL_CHARACTER}|{IN_PARENTHESES})*"
    rf"(?:{URL_LAST_CHARACTER}|{IN_PARENTHESES})"
)
MAY_HOLD_URL = r"(?i:(?:https?|ftp)://|www\.)"
_MARKDOWN_LINK = rf"(?i)!?\[([^\[\]]*)\]\(\s*<?{URL}>?(?:\s+[\"'][^\"'\n]*[\"'])?\s*\)"
_URL_AND_BRACKETS = rf"(?i)[ \t]?(?:\(\s*{URL}\s*\)|\[\s*{URL}\s*\]|<\s*{URL}\s*>|{URL})"

MAY_HOLD_TAG = r"</?[A-Za-z]"
# What the tags of prose leave. Those of programs (`<form>`, `<script>`) are not here: where they stand in a text, it is
# about them. Nor is `<s>`: it is also the text of a special token, as `<mask>` is.
_NEWLINE_TAGS = (
    "address article aside blockquote br center dd details div dl dt figcaption figure footer h1 h2 h3 h4 h5 "
    "h6 header hr li main nav ol p pre section summary table tbody tfoot thead tr ul"
)
_SPACE_TAGS = "td th"
_NOTHING_TAGS = (
    "a abbr acronym b bdi bdo big caption cite code col colgroup del dfn em font i img ins kbd q samp small span "
    "strike strong sub sup tt u var wbr"
)
_LEFT_BY_TAG = {
    name: left
    for names, left in ((_NEWLINE_TAGS, "\n"), (_SPACE_TAGS, " "), (_NOTHING_TAGS, ""))
    for name in names.split()
}
# Removing these behind a character would make 102 of 10<sup>2</sup>.
_SCRIPTS = {"sup": ("^{", "}"), "sub": ("_{", "}")}
# These stand without an end: the first anywhere, the second where a sentence or a line ends before them.
_VOID_TAGS = frozenset("br hr wbr".split())
_TAGS_WITH_OPTIONAL_END = frozenset("dd dt li p td th tr".split())
_ENDS_OF_SENTENCE = "\n.?!"

_ATTRIBUTE = (
    r"""\s+(?:[A-Za-z][\w:.-]*\s*=\s*(?:"[^"<>]*"|'[^'<>]*')"""
    r"""|(?i:align|alt|bgcolor|border|class|color|colspan|face|height|href|id|lang|name|rel|rowspan|size|src|start"""
    r"""|style|target|title|type|valign|value|width)=[^\s"'=<>`]+"""
    r"""|(?i:allowfullscreen|checked|compact|disabled|noshade|nowrap|readonly|reversed|selected)(?=[\s/>]))"""
)
_NAMES = "|".join(sorted(_LEFT_BY_TAG, key=len, reverse=True))
# `List<Object>` is code: a name is all in small letters or all in capitals.
_TAG_PATTERN = rf"<(?P<end>/)?(?P<name>{_NAMES}|{_NAMES.upper()})(?P<attributes>(?:{_ATTRIBUTE})*)\s*/?>"
_TAG = re.compile(_TAG_PATTERN)
# Markdown's code begins with one, two or more backticks and ends with as many.
_CODE_OR_TAG = re.compile(
    r"(?<!`)(?:(?P<fence>`{3,})(?!`)(?s:.*?)(?<!`)(?P=fence)|(?P<tick>``?)(?!`).*?(?<!`)(?P=tick))(?!`)|" + _TAG_PATTERN
)


def unescape_html(texts: pl.Series) -> pl.Series:
    """Replaces HTML character references by their characters, also those escaped several times."""
    return pl.Series([_unescape(text) for text in texts], dtype=pl.String)


def remove_tags(texts: pl.Series) -> pl.Series:
    """Removes HTML's tags and keeps what they enclose; blocks leave a newline, <sup> and <sub> ^{} and _{}.

    Only names that HTML has, with attributes as HTML writes them. A start tag without attributes goes with its end
    tag; alone it may be maths or code (`a<b>c`, `List<a>`) and stays, but for `<br>`, and `<p>` after a sentence.
    Markdown's code stays as it is.
    """
    return pl.Series([_remove_tags(text) for text in texts], dtype=pl.String)


def remove_urls(texts: pl.Series) -> pl.Series:
    """Removes URLs and the brackets that held nothing else; of a markdown link `[text](url)` the text stays."""
    while texts.str.contains(_MARKDOWN_LINK).any():  # links nest
        texts = replace_matches(texts, _MARKDOWN_LINK, "$1")
    return texts.str.replace_all(_URL_AND_BRACKETS, "")


def _unescape(text: str) -> str:
    while True:
        unescaped = _ENTITY.sub(_character_of, _REPEATED_AMPERSAND.sub("&amp;", text))
        if unescaped == text:
            return text
        text = unescaped


def _character_of(reference: re.Match) -> str:
    entity = reference[0]
    return unescape(entity) if entity[1] == "#" else html5.get(entity[1:], entity)


def _remove_tags(text: str) -> str:
    replacements: dict[re.Match, str] = {}
    open_tags: dict[str, list[re.Match]] = {}
    for match in (_CODE_OR_TAG if "`" in text else _TAG).finditer(text):
        if not match["name"]:
            continue  # code
        name = match["name"].lower()
        if not match["end"]:
            open_tags.setdefault(name, []).append(match)
            if match["attributes"] or _stands_alone(text, match.start(), name):
                replacements[match] = _LEFT_BY_TAG[name]
            continue
        replacements[match] = _LEFT_BY_TAG[name]
        if open_tags.get(name):
            start_tag = open_tags[name].pop()
            is_script = name in _SCRIPTS and _is_behind_a_character(text, start_tag.start())
            replacements[start_tag], replacements[match] = (
                _SCRIPTS[name] if is_script else (_LEFT_BY_TAG[name], _LEFT_BY_TAG[name])
            )
    pieces, position = [], 0
    for match in sorted(replacements, key=re.Match.start):
        pieces += [text[position : match.start()], replacements[match]]
        position = match.end()
    return "".join(pieces) + text[position:]


def _stands_alone(text: str, position: int, name: str) -> bool:
    if name in _VOID_TAGS:
        return True
    while position and text[position - 1] in " \t":
        position -= 1
    return name in _TAGS_WITH_OPTIONAL_END and (position == 0 or text[position - 1] in _ENDS_OF_SENTENCE)


def _is_behind_a_character(text: str, position: int) -> bool:
    return position > 0 and text[position - 1] != ">" and not text[position - 1].isspace()

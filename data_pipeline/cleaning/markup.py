"""Cleaning of markup: HTML character references, HTML tags and URLs; mathematics and code stay.

Each function takes and returns a series of strings. The pattern that belongs to it matches every text that it would
change.
"""

import re
from html import unescape
from html.entities import html5

import polars as pl

from data_pipeline.cleaning.characters import replace_matches

# Only references that end in `;`: otherwise `&parameter` in source code would become `¶meter`.
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
# What each prose tag leaves behind. Tags of programs (`<form>`, `<script>`) are not listed: a text that contains them is
# usually about them. `<s>` is not listed because, like `<mask>`, it is also the text of a special token.
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
# If these were removed after a character, 10<sup>2</sup> would become 102.
_SCRIPTS = {"sup": ("^{", "}"), "sub": ("_{", "}")}
# Tags that need no end tag: void tags anywhere, the others only after the end of a sentence or a line.
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
# A name must be all lower case or all upper case, because `List<Object>` is code.
_TAG_PATTERN = rf"<(?P<end>/)?(?P<name>{_NAMES}|{_NAMES.upper()})(?P<attributes>(?:{_ATTRIBUTE})*)\s*/?>"
_TAG = re.compile(_TAG_PATTERN)
# Code in Markdown begins with one or more backticks and ends with the same number.
_CODE_OR_TAG = re.compile(
    r"(?<!`)(?:(?P<fence>`{3,})(?!`)(?s:.*?)(?<!`)(?P=fence)|(?P<tick>``?)(?!`).*?(?<!`)(?P=tick))(?!`)|" + _TAG_PATTERN
)


def unescape_html(texts: pl.Series) -> pl.Series:
    """Replace HTML character references with their characters, including references escaped several times."""
    return pl.Series([_unescape(text) for text in texts], dtype=pl.String)


def remove_tags(texts: pl.Series) -> pl.Series:
    """Remove HTML tags and keep their content; blocks leave a newline, <sup> and <sub> leave ^{} and _{}.

    - Only HTML's own tag names count, with attributes in HTML syntax.
    - A start tag without attributes is removed together with its end tag. Without an end tag it may be maths or code
      (`a<b>c`, `List<a>`) and stays. Exceptions are `<br>` and its like, and `<p>` and its like after a sentence.
    - Code in Markdown stays.
    """
    return pl.Series([_remove_tags(text) for text in texts], dtype=pl.String)


def remove_urls(texts: pl.Series) -> pl.Series:
    """Remove URLs, and brackets that contained only a URL; a Markdown link `[text](url)` keeps its text."""
    while texts.str.contains(_MARKDOWN_LINK).any():  # links can be nested
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

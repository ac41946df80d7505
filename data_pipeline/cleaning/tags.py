"""Cleaning of HTML tags: their content stays, scripts become ^{} and _{}, and code becomes Markdown's."""

import re
from html import unescape

import polars as pl

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
# If these were removed, 10<sup>2</sup> would become 102.
_SCRIPTS = {"sup": ("^{", "}"), "sub": ("_{", "}")}
# A script beside a space is a formula's only if it is short and holds a sign or a digit; otherwise it is a note.
_FORMULA = re.compile(r"[+\-−–±]?\d{1,4}[+\-−–]?|[+\-−–]")
# Tags that need no end tag: void tags anywhere, the others only after the end of a sentence or a line.
_VOID_TAGS = frozenset("br hr wbr".split())
_TAGS_WITH_OPTIONAL_END = frozenset("dd dt li p td th tr".split())
_ENDS_OF_SENTENCE = "\n.?!"
_SPACES = " \t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
# Behind a mean value, as in `<p> = 0`. A paragraph does not begin like this.
_BEHIND_A_VALUE = re.compile(r"\s*[-=<>≈≃≅≡≠≤≥∼~≪≫∝+−*/·×^_,;:)\]|²³⁄&.!?%](?![A-Za-z/])|[ \t]+[a-z]")

# No quoted value may hold a placeholder of `protection.py`, because the region would be lost.
_ATTRIBUTE = (
    r"""\s+(?:[A-Za-z][\w:.-]*\s*=\s*(?:"[^"<>\ufdd0\ufdd1]*"|'[^'<>\ufdd0\ufdd1]*')"""
    r"""|(?i:align|alt|bgcolor|border|class|color|colspan|face|height|href|id|lang|name|rel|rowspan|size|src|start"""
    r"""|style|target|title|type|valign|value|width)=[^\s"'=<>`\ufdd0\ufdd1]+"""
    r"""|(?i:allowfullscreen|checked|compact|disabled|noshade|nowrap|readonly|reversed|selected)(?=[\s/>]))"""
)
_NAMES = "|".join(sorted(_LEFT_BY_TAG, key=len, reverse=True))
# A name must be all lower case or all upper case, because `List<Object>` is code.
_TAG = re.compile(rf"<(?P<end>/)?(?P<name>{_NAMES}|{_NAMES.upper()})(?P<attributes>(?:{_ATTRIBUTE})*)\s*/?>")

CODE_ELEMENT = ("<",)
_CODE_ELEMENT = re.compile(r"(?is)<(pre|code)\b[^<>]*>(.*)</\1>")
_LANGUAGE = re.compile(r"""(?i)\bclass\s*=\s*["']?[^"'<>]*\b(?:language|lang)-([\w+#-]+)""")
_INNER_TAG = re.compile(r"(?i)</?(?:code|span)\b[^<>]*>")


def remove_tags(texts: pl.Series) -> pl.Series:
    """Remove HTML tags and keep their content; blocks leave a newline, <sup> and <sub> leave ^{} and _{}.

    - Only HTML's own tag names count, with attributes in HTML syntax.
    - A start tag without attributes is removed together with its end tag. Without an end tag it may be maths or code
      (`a<b>c`, `List<a>`) and stays. Exceptions are `<br>` and its like, and `<p>` and its like after a sentence.
    """
    return pl.Series([_remove_tags(text) for text in texts], dtype=pl.String)


def code_to_markdown(element: str) -> str:
    """Turn `<code>` into code between backticks, and `<pre>` into a fenced block."""
    found = _CODE_ELEMENT.fullmatch(element)
    if not found:
        return element
    code = unescape(_INNER_TAG.sub("", found[2]))  # once, as a browser does: what is escaped in code is meant literally
    if found[1].lower() == "code" and "\n" not in code:
        if not code.strip():
            return code
        return f"`` {code} ``" if "`" in code else f"`{code}`"
    language = _LANGUAGE.search(element)
    fence = "````" if "```" in code else "```"
    return f"\n{fence}{language[1] if language else ''}\n{code.strip(chr(10)).rstrip()}\n{fence}\n"


def _remove_tags(text: str) -> str:
    replacements: dict[re.Match, str] = {}
    open_tags: dict[str, list[re.Match]] = {}
    scripts: list[tuple[re.Match, re.Match]] = []
    for match in _TAG.finditer(text):
        name = match["name"].lower()
        if not match["end"]:
            open_tags.setdefault(name, []).append(match)
            if match["attributes"] or _stands_alone(text, match, name):
                replacements[match] = _LEFT_BY_TAG[name]
            continue
        replacements[match] = _LEFT_BY_TAG[name]
        if open_tags.get(name):
            start_tag = open_tags[name].pop()
            replacements[start_tag] = _LEFT_BY_TAG[name]
            if name in _SCRIPTS:
                scripts.append((start_tag, match))
    inline = {match.end(): match.start() for match, left in replacements.items() if not left}
    behind = {match.start(): match.end() for match, left in replacements.items() if not left}
    for start_tag, end_tag in scripts:
        if _is_in_a_formula(text, start_tag, end_tag, inline, behind):
            replacements[start_tag], replacements[end_tag] = _SCRIPTS[start_tag["name"].lower()]
    pieces, position = [], 0
    for match in sorted(replacements, key=re.Match.start):
        pieces += [text[position : match.start()], replacements[match]]
        position = match.end()
    return "".join(pieces) + text[position:]


def _stands_alone(text: str, tag: re.Match, name: str) -> bool:
    if name in _VOID_TAGS:
        return True
    before = text[: tag.start()].rstrip(_SPACES)
    if name not in _TAGS_WITH_OPTIONAL_END or (before and before[-1] not in _ENDS_OF_SENTENCE):
        return False
    return name != "p" or not _BEHIND_A_VALUE.match(text, tag.end())


def _is_in_a_formula(
    text: str, start_tag: re.Match, end_tag: re.Match, inline: dict[int, int], behind: dict[int, int]
) -> bool:
    """Whether a script touches a character, past other tags that leave nothing, or is a number or a sign.

    inline: start by end of the tags that leave nothing; behind: end by start.
    """
    content = text[start_tag.end() : end_tag.start()].strip()
    if not content:
        return False
    start, end = start_tag.start(), end_tag.end()
    while start in inline:
        start = inline[start]
    while end in behind:
        end = behind[end]
    touches = (
        (start > 0 and not text[start - 1].isspace()) or text[end : end + 1].isalnum() or text[end : end + 1] == "√"
    )
    return touches or bool(_FORMULA.fullmatch(content))

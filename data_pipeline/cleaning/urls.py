"""Cleaning of URLs: prose loses them; code, commands and quoted URLs keep them."""

import polars as pl

from data_pipeline.cleaning.rows import map_rows

# Letters beyond ASCII that a URL may hold unescaped. Scripts without spaces are left out, because there a URL ends at the first
# letter of the sentence (`详见https://example.org的证明`), and so is all punctuation beyond ASCII.
_LETTERS = (
    "ªµºÀ-ÖØ-öø-ʯ\u0300-\u037d\u0386\u0388-\u0559\u0561-\u0587\u05d0-\u05ea\u0620-\u0669\u066e-\u06d3\u06d5-\u06fc"
    "\u0710-\u0963\u0966-\u0df3\u10a0-\u10fa\u10fc-\u135a\u1e00-\u1fff"
)
_NOT_IN_URLS = r"\s<>\"`()\[\]{}|\\^"
_ASCII = r"!#$%&'*+,\-./0-9:;=?@A-Z_a-z~"
_ASCII_AT_THE_END = r"#$%&+\-/0-9=@A-Z_a-z~"
URL_CHARACTER = f"[{_ASCII}{_LETTERS}]"
_IN_PARENTHESES = rf"\({URL_CHARACTER}*\)"  # .../wiki/Ring_(mathematics)
URL = (
    rf"(?i:(?:https?|ftp)://|(?-u:\b)www\.)(?:{URL_CHARACTER}|{_IN_PARENTHESES})*"
    rf"(?:[{_ASCII_AT_THE_END}{_LETTERS}]|{_IN_PARENTHESES})"
)
MAY_HOLD_URL = r"://|(?i:www)\."

_TITLE = r"\s+(?:\"[^\"\n\ufdd0\ufdd1]*\"|'[^'\n\ufdd0\ufdd1]*')"
_MARKDOWN_LINK = rf"!?\[([^\[\]]*)\]\(\s*<?{URL}>?(?:{_TITLE})?\s*\)"
_WITH_BRACKETS = rf"[ \t]?(?:\(\s*{URL}\s*\)|\[\s*{URL}\s*\]|<\s*{URL}\s*>|{URL})"
_IN_WIDE_BRACKETS = "|".join(rf"{opening}\s*{URL}\s*{closing}" for opening, closing in ("（）", "【】", "「」", "《》"))
# What stands before a URL that is an argument: a quote, an assignment, a LaTeX command, or a command with its options.
_COMMAND = (
    r"\b(?:git (?:clone|fetch|pull|push|remote add \S+)|curl|wget|pip3? install|npm (?:install|i)|docker (?:pull|run)"
    r"|go (?:get|install)|brew (?:install|tap)|helm repo add \S+|svn (?:checkout|co)|add-apt-repository|apt-key adv"
    r"|Invoke-WebRequest|youtube-dl|GET|POST|PUT|PATCH|DELETE|HEAD)"
    r"(?:[ \t]+(?:-\S+|\"[^\"\n]*\"|'[^'\n]*'|[A-Z]+|\d+|[\w./-]+\.\w+))*?[ \t]+"
)
_ARGUMENT = rf"(?:[\"'=]|\{{\s*|{_COMMAND}){URL}"
_ARGUMENT_OR_URL = rf"({_ARGUMENT})|{_WITH_BRACKETS}"


def remove_urls(texts: pl.Series) -> pl.Series:
    """Remove URLs, and brackets that contained only a URL; a Markdown link `[text](url)` keeps its text.

    A URL that is used as an argument is kept: in quotes, after `=` or `{`, or after a command such as `git clone`.
    """
    while (rows := texts.str.contains(_MARKDOWN_LINK).arg_true()).len():  # links can be nested
        texts = map_rows(texts, rows, lambda some: some.str.replace_all(_MARKDOWN_LINK, "$1"))
    texts = map_rows(texts, texts.str.contains_any(["（", "【", "「", "《"]).arg_true(), _without_wide_brackets)
    # Groups make replacing slow, and few texts need them.
    has_argument = texts.str.contains(_ARGUMENT)
    texts = map_rows(texts, has_argument.arg_true(), lambda some: some.str.replace_all(_ARGUMENT_OR_URL, "$1"))
    return map_rows(texts, (~has_argument).arg_true(), lambda some: some.str.replace_all(_WITH_BRACKETS, ""))


def _without_wide_brackets(texts: pl.Series) -> pl.Series:
    return texts.str.replace_all(_IN_WIDE_BRACKETS, "")

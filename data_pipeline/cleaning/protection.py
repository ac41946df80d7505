"""Protected regions: the parts of a text that the cleaning of markup and white space must not touch.

`protect` takes the regions out of a column and leaves a placeholder for each, `restore` puts them back. The rules in
between work on whole columns and need not know what a region is. These are regions:

- code: fenced, inline, `<pre>` and `<code>`, and what `layout.py` finds: indented blocks, programs, commands and logs;
- LaTeX: formulas between dollars, `\\(...\\)` or `\\[...\\]`, and environments;
- tables and XML, which `layout.py` finds as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import polars as pl

from data_pipeline.cleaning.layout import find_layout, may_have_layout
from data_pipeline.cleaning.rows import map_rows

# Noncharacters, which no text should hold. A text that holds them nevertheless gets them back, because they are regions.
PLACEHOLDER, LAYOUT_PLACEHOLDER = "\ufdd0", "\ufdd1"

_NO_BLANK_LINE = r"(?:[^$\n]|\n[^$\n])"
_REGION = (
    r"(?s:"
    r"`{4,}.*?`{4,}|```.*?(?:```|\z)|~~~.*?(?:~~~|\z)"  # an unclosed fence ends with the text
    r"|``[^`'\n]+``|``[^`\n]*`[^`\n]+`[^`\n]*``|``[^`'\n]+`[^`'\n]+``|`[^`\n]+`"  # not ``quoted'', as in LaTeX
    r"|(?i:<pre\b[^<>]*>.*?</pre>|<code\b[^<>]*>.*?</code>)"
    r"|\\[\\$`]"  # escaped, so that they begin nothing
    rf"|\$\$.+?\$\$|\$[^\s$](?:{_NO_BLANK_LINE}*?[^\s$\\])?\$"
    rf"|\$[ \n]{_NO_BLANK_LINE}*?[\\^_{{}}=]{_NO_BLANK_LINE}*?\n?\$"
    r"|\\\(.*?\\\)|\\\[.*?\\\]"
    # Environments contain others: up to the last end before a blank line, otherwise up to the first.
    r"|\\begin\{(?:(?:[^\n]|\n[^\n])*\n?|.*?)\\end\{[A-Za-z]+\*?\}"
    rf"|{PLACEHOLDER})"
)
_BEGIN = re.compile(r"\\begin\{([A-Za-z]+\*?)\}")
_OTHER_BEGINNING = re.compile(rf"[`$<~{PLACEHOLDER}]|\\[\\$`(\[]")
_MAY_HAVE_REGION = rf"[`$\\{PLACEHOLDER}]|~~~|</(?:pre|code|PRE|CODE)"


@dataclass(frozen=True)
class Regions:
    """The regions that were taken out of a column.

    rows: numbers of the rows that have any.
    regions: the regions of these rows, one after another, as strings; counts: how many each row has.
    layout: for each of these rows, the regions that `layout.py` found; they can be part of other regions.
    """

    rows: pl.Series
    regions: list[str]
    counts: list[int]
    layout: list[list[str]]

    def map(self, beginnings: tuple[str, ...], function: Callable[[str], str]) -> tuple[Regions, pl.Series]:
        """Apply a function to the regions that begin with certain strings; layout stays as it is.

        Returns the regions, and the numbers of the rows that were changed.
        """
        regions = [function(region) if region.startswith(beginnings) else region for region in self.regions]
        changed, place = [], 0
        if regions != self.regions:
            for row, count in zip(self.rows, self.counts, strict=True):
                if regions[place : place + count] != self.regions[place : place + count]:
                    changed.append(row)
                place += count
        return Regions(self.rows, regions, self.counts, self.layout), pl.Series(changed, dtype=pl.UInt32)

    def restore(self, texts: pl.Series) -> pl.Series:
        """Put the regions back in the place of their placeholders."""
        return map_rows(texts, self.rows, self._filled)

    def _filled(self, texts: pl.Series) -> pl.Series:
        regions, filled = iter(self.regions), []
        for text, count, layout in zip(texts.to_list(), self.counts, self.layout, strict=True):
            text = _fill(text, PLACEHOLDER, [next(regions) for _ in range(count)])
            filled.append(_fill(text, LAYOUT_PLACEHOLDER, layout) if layout else text)
        return pl.Series(filled, dtype=pl.String)


def protect(texts: pl.Series) -> tuple[pl.Series, Regions]:
    """Replace the protected regions of each text with placeholders."""
    found: dict[int, tuple[list[str], list[str]]] = {}
    changed: dict[int, str] = {}
    rows = may_have_layout(texts).arg_true()
    some = texts.gather(rows)
    for row, text, spans in zip(rows.to_list(), some.to_list(), find_layout(some), strict=True):
        if spans or LAYOUT_PLACEHOLDER in text:
            changed[row], layout = _without(text, spans)
            found[row] = [], layout
    texts = _replaced(texts, changed)
    rows = texts.str.contains(_MAY_HAVE_REGION).arg_true()
    some = texts.gather(rows)
    changed = {}
    of_rows = _with_single_environments(some.str.extract_all(_REGION).to_list())
    for row, text, regions in zip(rows.to_list(), some.to_list(), of_rows, strict=True):
        if regions:
            changed[row] = _without_regions(text, regions)
            found[row] = regions, found[row][1] if row in found else []
    texts = _replaced(texts, changed)
    ordered = sorted(found)
    return texts, Regions(
        pl.Series(ordered, dtype=pl.UInt32),
        [region for row in ordered for region in found[row][0]],
        [len(found[row][0]) for row in ordered],
        [found[row][1] for row in ordered],
    )


def _replaced(texts: pl.Series, changed: dict[int, str]) -> pl.Series:
    if not changed:
        return texts
    rows = pl.Series(list(changed), dtype=pl.UInt32)
    return texts.clone().scatter(rows, pl.Series(list(changed.values()), dtype=pl.String))


def _with_single_environments(of_rows: list[list[str]]) -> list[list[str]]:
    """Cut regions that have several environments one after another, so that the prose between them is cleaned."""
    # One search for the rests of all rows: each search would build its automaton again.
    rests: list[tuple[list[str], int, str]] = []
    cut_rows = []
    for regions in of_rows:
        cut: list[str] = []
        for region in regions:
            environments, rest = _cut_environments(region)
            cut += environments
            if rest:
                rests.append((cut, len(cut), rest))
        cut_rows.append(cut)
    if rests:
        found = pl.Series([rest for _, _, rest in rests], dtype=pl.String).str.extract_all(_REGION).to_list()
        # From the last to the first, so that the places of those that are left stay right.
        for (cut, place, _), more in reversed(list(zip(rests, _with_single_environments(found), strict=True))):
            cut[place:place] = more
    return cut_rows


def _cut_environments(region: str) -> tuple[list[str], str]:
    """Cut a region after each environment, up to the rest that may hold a region of another kind.

    Such a region has no blank line and ends with the end of an environment. So what begins with the next environment is what a
    search would find.
    """
    pieces = []
    while 0 < (end := _end_of_environment(region)) < len(region):
        pieces.append(region[:end])
        rest = region[end:]
        following = rest.find("\\begin{")
        if _OTHER_BEGINNING.search(rest if following < 0 else rest[:following]):
            return pieces, rest
        if following < 0:
            return pieces, ""
        region = rest[following:]
    return [*pieces, region], ""


def _end_of_environment(region: str) -> int:
    """Return where the first environment of a region ends; 0 if the region begins with none, or if it has no end."""
    name = _BEGIN.match(region)
    if not name:
        return 0
    end_tag = f"\\end{{{name[1]}}}"
    end = region.find(end_tag)
    return end + len(end_tag) if end >= 0 else 0


def _without_regions(text: str, regions: list[str]) -> str:
    pieces, position = [], 0
    for region in regions:
        start = text.index(region, position)
        pieces.append(text[position:start])
        position = start + len(region)
    return PLACEHOLDER.join([*pieces, text[position:]])


def _without(text: str, spans: list[tuple[int, int]]) -> tuple[str, list[str]]:
    """Replace spans with placeholders, and return what was there."""
    if LAYOUT_PLACEHOLDER in text:
        spans = sorted({*spans, *_literal_placeholders(text, spans)})
    pieces, layout, position = [], [], 0
    for start, end in spans:
        pieces.append(text[position:start])
        layout.append(text[start:end])
        position = end
    return LAYOUT_PLACEHOLDER.join([*pieces, text[position:]]), layout


def _literal_placeholders(text: str, spans: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    for found in re.finditer(LAYOUT_PLACEHOLDER, text):
        if not any(start <= found.start() < end for start, end in spans):
            yield found.span()


def _fill(text: str, placeholder: str, regions: list[str]) -> str:
    parts = text.split(placeholder)
    filled = [""] * (2 * len(parts) - 1)
    filled[::2], filled[1::2] = parts, regions
    return "".join(filled)

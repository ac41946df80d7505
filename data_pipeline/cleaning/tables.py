"""Finds tables in the lines of a text: rows between bars, columns separated by tabs, and columns aligned with spaces."""

import re
from itertools import pairwise

import polars as pl

_BAR_OR_TAB = r"\t|\|\n|\| \n|-\|-|-\+-"
# Aligned columns of different width have three spaces somewhere.
_GAPS_IN_TWO_LINES = r"[!-~]   +[!-~][^\n]*\n+[^\n]*[!-~]  +[!-~]|[!-~]  +[!-~][^\n]*\n+[^\n]*[!-~]   +[!-~]"
_BARS = re.compile(r"\s*\|.*\|\s*$")
_RULE_OF_BARS = re.compile(r"\s*\|?[\s:|+=-]*-{2,}[\s:|+=-]*\|[\s:|+=-]*$|\s*\+[-=+]{2,}\+?\s*$")
# The space between two columns. Behind the end of a sentence, two spaces are only a typist's habit.
_GAP = re.compile(r"(?<=[^\s.?!:;,])  +(?=\S)|(?<=\S)   +(?=\S)")
_LONGEST_CELL, _LONGEST_ROW = 40, 200


def may_have_table(text: pl.Expr) -> pl.Expr:
    """Search for signs of tables: true for every text in which `find_tables` finds something."""
    return text.str.contains(_BAR_OR_TAB) | text.str.contains(_GAPS_IN_TWO_LINES)


def find_tables(lines: list[str]) -> set[int]:
    """Find the numbers of the lines that are rows of tables."""
    return _between_bars(lines) | _separated_by_tabs(lines) | _aligned(lines)


def _between_bars(lines: list[str]) -> set[int]:
    found = set()
    for number, line in enumerate(lines):
        if "|" not in line and "+" not in line:
            continue
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if _RULE_OF_BARS.match(line):  # GitHub's tables need no bars at the edges
            found |= _while_bars(lines, number, 1) | _while_bars(lines, number, -1) | {number}
        elif _BARS.match(line) and _BARS.match(below):
            found |= {number, number + 1}
    return found


def _while_bars(lines: list[str], number: int, step: int) -> set[int]:
    found, number = set(), number + step
    while 0 <= number < len(lines) and "|" in lines[number]:
        found.add(number)
        number += step
    return found


def _separated_by_tabs(lines: list[str]) -> set[int]:
    if not any("\t" in line for line in lines):
        return set()
    tabs = [line.strip(" \t").count("\t") for line in lines]
    pairs = [number for number, (one, next_one) in enumerate(pairwise(tabs)) if one and one == next_one]
    return {number + place for number in pairs for place in (0, 1)}


def _aligned(lines: list[str]) -> set[int]:
    """Find neighbouring lines of short cells that share a column in which a cell begins or ends."""
    found: set[int] = set()
    above: tuple[int, set[int], set[int]] | None = None
    for number, line in enumerate(lines):
        if not line.strip() or not line.strip("-=_ "):  # a ruled line under the head
            continue
        cells = _cells(line) if len(line) <= _LONGEST_ROW and "  " in line else []
        if not cells:
            above = None
            continue
        starts, ends = {start for start, _ in cells[1:]}, {end for _, end in cells[1:]}
        if above and number - above[0] <= 2 and (starts & above[1] or ends & above[2]):
            found |= set(range(above[0], number + 1))
        above = number, starts, ends
    return found


def _cells(line: str) -> list[tuple[int, int]]:
    """Return start and end of each cell; none if the line has no gap or a cell is too long."""
    cells, start = [], len(line) - len(line.lstrip())
    for gap in _GAP.finditer(line):
        cells.append((start, gap.start()))
        start = gap.end()
    cells.append((start, len(line.rstrip())))
    return cells if len(cells) > 1 and all(end - begin <= _LONGEST_CELL for begin, end in cells) else []

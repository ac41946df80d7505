"""What each cleaning rule changes in some texts, as differences that a person can check."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import polars as pl

from data_pipeline.cleaning.clean import RULES, CleaningOptions, Newlines, UnicodeForm, clean_series

_TOKEN = re.compile(r"\w+|\s|.", re.DOTALL)
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎\n", "\t": "⇥", "\u00a0": "⍽"})
CONTEXT = 30  # characters shown on both sides of a change
LONGEST_COMPARED = 6000  # characters; comparing takes time that grows with the square of the length


@dataclass(frozen=True)
class Effect:
    """What one rule changes.

    rule: its name.
    rows: numbers of the texts that it changes.
    before, after: these texts cleaned without the rule, and with it.
    """

    rule: str
    rows: list[int]
    before: list[str]
    after: list[str]


@dataclass(frozen=True)
class Change:
    """A place that a rule changes: what it removes and adds, and what stands around it."""

    left: str
    removed: str
    added: str
    right: str


def effects(texts: pl.Series, options: CleaningOptions) -> Iterator[Effect]:
    """Compare the cleaned texts with those that are cleaned without a rule, for each rule that is on."""
    cleaned = clean_series(texts, options)
    for name in RULES:
        if name in options.without:
            continue
        # A rule that is off may not have an option.
        unicode_form: UnicodeForm = "NFC" if name == "normalize_unicode" else options.unicode_form
        newlines: Newlines = "keep" if name == "normalize_whitespace" else options.newlines
        others = replace(options, unicode_form=unicode_form, newlines=newlines, without=(*options.without, name))
        without = clean_series(texts, others)
        rows = (without != cleaned).arg_true()
        yield Effect(name, rows.to_list(), without.gather(rows).to_list(), cleaned.gather(rows).to_list())


def changes(before: str, after: str) -> Iterator[Change]:
    """Yield the places where two texts differ, in order."""
    start = _common_start(before, after)
    left, right = (_TOKEN.findall(text[start : start + LONGEST_COMPARED]) for text in (before, after))
    for kind, i, j, k, m in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind != "equal":
            place = start + sum(map(len, left[:i]))
            removed, added = "".join(left[i:j]), "".join(right[k:m])
            behind = before[place + len(removed) : place + len(removed) + CONTEXT]
            yield Change(before[max(0, place - CONTEXT) : place], removed, added, behind)


def visible(text: str) -> str:
    """Replace white space with signs, for texts in which it matters."""
    return text.translate(_VISIBLE)


def _common_start(before: str, after: str) -> int:
    same = 0
    for one, other in zip(before, after, strict=False):
        if one != other:
            break
        same += 1
    return max(0, same - CONTEXT)

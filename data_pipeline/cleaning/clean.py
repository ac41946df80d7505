"""Text cleaning: one named polars expression per rule, the same for a corpus and for a single prompt.

The rules for markup and white space work only outside of the protected regions of a text: code, LaTeX, tables and XML
(`protection.py`). The rules together are idempotent: cleaning a clean text changes nothing.

Most texts need no rule, and no text needs all of them. Each rule therefore has a pattern that finds the texts it might
change, and the union of the patterns finds the texts that need any rule. A clean text costs only one search.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Literal, get_args

import polars as pl

from data_pipeline.cleaning import characters, entities, tags, urls, whitespace
from data_pipeline.cleaning.protection import protect
from data_pipeline.cleaning.rows import map_rows
from data_pipeline.errors import DataError

UnicodeForm = Literal["NFC", "NFKC"]
Newlines = Literal["keep", "space"]
# Increased if the rules of the same names clean differently: a folder made with other rules must not pass for this one.
VERSION = 2


@dataclass(frozen=True)
class Rule:
    """A cleaning rule: called with a string expression, it returns the expression of the cleaned strings.

    pattern: a polars regular expression that matches every text that the rule would change.
    apply: changes the texts, which have placeholders instead of their protected regions unless `everywhere` is set.
    alone: whether a text that it changes gets the later rules only in the next pass, in which its regions are looked
        for again.
    first: what the rule does to the whole texts before their regions are protected.
    inside: what it does to protected regions: the beginnings of the regions, and a function.
    """

    pattern: str
    apply: Callable[[pl.Series], pl.Series]
    everywhere: bool = False
    alone: bool = False
    first: Callable[[pl.Series], pl.Series] | None = None
    inside: tuple[tuple[str, ...], Callable[[str], str]] | None = None

    def __call__(self, text: pl.Expr) -> pl.Expr:
        return text.map_batches(self.clean, return_dtype=pl.String, is_elementwise=True)

    def clean(self, texts: pl.Series) -> pl.Series:
        """Apply the rule once to a series."""
        rows = texts.str.contains(self.pattern).arg_true()
        return map_rows(texts, rows, partial(_apply_outside_of_regions, [self]))

    def apply_where_needed(self, texts: pl.Series, chosen: pl.Series) -> pl.Series:
        """Change the texts that match the pattern; chosen: a bool for each text, whether it may change."""
        return map_rows(texts, (texts.str.contains(self.pattern) & chosen).arg_true(), self.apply)


# The order matters:
# - mojibake before control characters: its repair needs the control characters in it
# - NFC before character references: it turns look-alikes of `;` and `K`, which references are made of, into these
# - tags before URLs: tags contain URLs
RULES: dict[str, Rule] = {
    "fix_mojibake": Rule(characters.MOJIBAKE, characters.fix_mojibake, everywhere=True),
    "remove_control_characters": Rule(
        characters.CONTROL_CHARACTERS, characters.remove_control_characters, everywhere=True
    ),
    "normalize_unicode": Rule(characters.NOT_SURELY_NFC, characters.compose, everywhere=True),
    "unescape_html": Rule(
        entities.ENTITY,
        entities.unescape_html,
        alone=True,  # a reference can hide the beginning of a region: `&lt;pre&gt;`
        inside=(entities.FORMULA, entities.unescape_in_formula),
    ),
    "remove_tags": Rule(tags.MAY_HOLD_TAG, tags.remove_tags, inside=(tags.CODE_ELEMENT, tags.code_to_markdown)),
    "remove_urls": Rule(urls.MAY_HOLD_URL, urls.remove_urls),
    "normalize_whitespace": Rule(
        whitespace.UNTIDY_WHITESPACE, whitespace.normalize_whitespace, first=whitespace.unify_line_breaks
    ),
}
# The rules that take the place of a default rule if an option asks for them.
INSTEAD: dict[tuple[str, str], tuple[str, str, Rule]] = {
    ("unicode_form", "NFKC"): (
        "normalize_unicode",
        "normalize_unicode_compatibly",
        Rule(characters.NOT_ASCII, characters.compose_compatibly, everywhere=True),
    ),
    ("newlines", "space"): (
        "normalize_whitespace",
        "normalize_whitespace_to_one_line",
        Rule(whitespace.UNTIDY_WHITESPACE_OR_NEWLINE, whitespace.to_one_line, everywhere=True),
    ),
}
OF_CHARACTERS = ("fix_mojibake", "remove_control_characters", "normalize_unicode", "normalize_unicode_compatibly")


@dataclass(frozen=True)
class CleaningOptions:
    """The options of cleaning; raises DataError for an unknown value.

    unicode_form: NFC only composes; NFKC also replaces compatibility forms: ﬁ becomes fi, but x² also becomes x2.
    newlines: `keep` keeps them, with at most one blank line in a row; `space` makes each text a single line.
    without: names of rules of RULES that are not applied.
    """

    unicode_form: UnicodeForm = "NFC"
    newlines: Newlines = "keep"
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in (("unicode_form", get_args(UnicodeForm)), ("newlines", get_args(Newlines))):
            if (value := getattr(self, name)) not in choices:
                raise DataError(f"the cleaning option {name} is {value!r}: set it to {' or '.join(choices)}")
        for name in self.without:
            if name not in RULES:
                raise DataError(f"there is no cleaning rule {name!r}: the rules are {', '.join(RULES)}")
        object.__setattr__(self, "without", tuple(name for name in RULES if name in self.without))
        for (option, value), (name, _, _) in INSTEAD.items():
            if getattr(self, option) == value and name in self.without:
                raise DataError(
                    f"the cleaning option {option} is {value!r}, but the rule {name} is off: switch it on, or leave out "
                    "the option"
                )


DEFAULT_OPTIONS = CleaningOptions()


def without_rules(choice: Sequence[str]) -> tuple[str, ...]:
    """Turn a choice of rules into the names of the rules that are off.

    choice: the names of the rules that are on, or the names of rules that are off with `no_` before each, or `none`.
    Nothing means all rules.
    Raises DataError for an unknown name, and for a mixture.
    """
    if list(choice) == ["none"]:
        return tuple(RULES)
    off = [name.removeprefix("no_") for name in choice if name.startswith("no_")]
    on = [name for name in choice if not name.startswith("no_")]
    for name in (*off, *on):
        if name not in RULES:
            raise DataError(f"there is no cleaning rule {name!r}: the rules are {', '.join(RULES)}")
    if on and off:
        raise DataError(
            f"the cleaning rules are {' '.join(choice)}: name the rules that are on, or only those that are off, with no_ "
            "before each"
        )
    return tuple(name for name in RULES if (name in off if off else on and name not in on))


@cache
def rules(options: CleaningOptions = DEFAULT_OPTIONS) -> dict[str, Rule]:
    """Return the rules for these options by name, in order; a rule that differs from the default has its own name."""
    chosen = {}
    instead = {
        name: (new, rule) for (option, value), (name, new, rule) in INSTEAD.items() if getattr(options, option) == value
    }
    for name, rule in RULES.items():
        if name not in options.without:
            new_name, new_rule = instead.get(name, (name, rule))
            chosen[new_name] = new_rule
    return chosen


def rule_names(options: CleaningOptions = DEFAULT_OPTIONS) -> list[str]:
    """List the names of the rules in order; together they describe how a text was cleaned."""
    return list(rules(options))


def clean(text: pl.Expr, options: CleaningOptions = DEFAULT_OPTIONS) -> pl.Expr:
    """Apply the rules, in order, to a string column until they change nothing; nulls stay."""
    return text.map_batches(partial(clean_series, options=options), return_dtype=pl.String, is_elementwise=True)


def clean_text(text: str, options: CleaningOptions = DEFAULT_OPTIONS) -> str:
    """Clean a single string in the same way as a corpus."""
    return clean_series(pl.Series([text], dtype=pl.String), options).item()


def clean_series(texts: pl.Series, options: CleaningOptions = DEFAULT_OPTIONS) -> pl.Series:
    """Clean a series of strings; nulls stay."""
    steps = _steps(options)
    if not steps.pattern:
        return texts
    rows = texts.str.contains(steps.pattern).arg_true()
    texts = texts.clone()
    # The result of one rule may need another (`&am&shy;p;lt;p>`), so the rules repeat until they no longer change a row.
    # The loop terminates: no rule undoes another, and every rule except composing shortens a text or simplifies its
    # spaces.
    while not rows.is_empty():
        before = texts.gather(rows)
        after = _apply_once(before, steps)
        texts.scatter(rows, after)
        rows = rows.filter((after != before) & after.str.contains(steps.pattern))
    return texts


@dataclass(frozen=True)
class _Steps:
    """The rules in the groups that are applied together, and the pattern of all texts that need any of them.

    polars keeps 32 compiled patterns. One pass uses fewer, or every search would compile its pattern again.
    """

    pattern: str
    of_characters: list[Rule]
    others: list[Rule]


@cache
def _steps(options: CleaningOptions) -> _Steps:
    chosen = rules(options)
    of_characters = [rule for name, rule in chosen.items() if name in OF_CHARACTERS]
    others = [rule for name, rule in chosen.items() if name not in OF_CHARACTERS]
    pattern = "|".join(rule.pattern for rule in chosen.values())
    return _Steps(pattern, of_characters, others)


def _apply_once(texts: pl.Series, steps: _Steps) -> pl.Series:
    """Apply each rule once, in order."""
    # Few texts have unusual characters, so one search for any of them saves a search per rule.
    if steps.of_characters:
        rows = texts.str.contains(characters.UNUSUAL_CHARACTERS).arg_true()
        texts = map_rows(texts, rows, partial(_apply_in_order, steps.of_characters))
    return _apply_outside_of_regions(steps.others, texts) if steps.others else texts


def _apply_in_order(rules: list[Rule], texts: pl.Series) -> pl.Series:
    """Apply rules to the texts that need any of them."""
    rows = texts.str.contains("|".join(rule.pattern for rule in rules)).arg_true()
    return map_rows(texts, rows, lambda some: reduce(lambda series, rule: rule.apply(series), rules, some))


def _apply_outside_of_regions(rules: list[Rule], texts: pl.Series) -> pl.Series:
    """Apply rules to the texts outside of their regions.

    A text that a rule with `alone` changes gets none of the later rules.
    """
    outside = [rule for rule in rules if not rule.everywhere]
    done = pl.repeat(False, len(texts), dtype=pl.Boolean, eager=True)
    for rule in outside:
        if rule.first:
            texts = rule.first(texts)
    if outside:
        texts, regions = protect(texts)
        for rule in outside:
            before = texts
            texts = rule.apply_where_needed(texts, ~done)
            rows = pl.Series(dtype=pl.UInt32)
            if rule.inside:
                regions, rows = regions.map(*rule.inside)
            if rule.alone:
                done = (texts != before).scatter(rows, True)
        texts = regions.restore(texts)
    for rule in rules:
        if rule.everywhere:
            texts = rule.apply_where_needed(texts, ~done)
    return texts

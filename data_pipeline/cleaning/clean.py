"""Text cleaning: one named polars expression per rule, the same for a corpus and for a single prompt.

Every rule leaves mathematics alone: LaTeX, `a < b` and `x<y>z` stay byte for byte the same. The rules together are
idempotent: cleaning a clean text changes nothing.

Most texts need no rule, and no text needs all of them. Each rule therefore has a pattern that finds the texts it might
change, and the union of the patterns finds the texts that need any rule. A clean text costs only one search.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, get_args

import polars as pl

from data_pipeline.cleaning import characters, markup
from data_pipeline.errors import DataError

UnicodeForm = Literal["NFC", "NFKC"]
Newlines = Literal["keep", "space"]


@dataclass(frozen=True)
class CleaningOptions:
    """The options of cleaning; raises DataError for an unknown value.

    unicode_form: NFC only composes; NFKC also replaces compatibility forms: ﬁ becomes fi, but x² also becomes x2.
    newlines: `keep` keeps them, with at most one blank line in a row; `space` makes each text a single line.
    """

    unicode_form: UnicodeForm = "NFC"
    newlines: Newlines = "keep"

    def __post_init__(self):
        for name, choices in (("unicode_form", get_args(UnicodeForm)), ("newlines", get_args(Newlines))):
            if (value := getattr(self, name)) not in choices:
                raise DataError(f"the cleaning option {name} is {value!r}: set it to {' or '.join(choices)}")


@dataclass(frozen=True)
class Rule:
    """A cleaning rule: called with a string expression, it returns the expression of the cleaned strings.

    pattern: a polars regular expression that matches every text that `apply` would change.
    """

    pattern: str
    apply: Callable[[pl.Series], pl.Series]

    def __call__(self, text: pl.Expr) -> pl.Expr:
        return text.map_batches(self.apply_where_needed, return_dtype=pl.String, is_elementwise=True)

    def apply_where_needed(self, texts: pl.Series) -> pl.Series:
        return characters.map_rows(texts, texts.str.contains(self.pattern).arg_true(), self.apply)


DEFAULT_OPTIONS = CleaningOptions()
# The order matters:
# - mojibake before control characters: its repair needs the control characters in it
# - NFC before character references: it turns look-alikes of `;` and `K`, which references are made of, into these
# - tags before URLs: tags contain URLs
RULES: dict[str, Rule] = {
    "fix_mojibake": Rule(characters.MOJIBAKE, characters.fix_mojibake),
    "remove_control_characters": Rule(characters.CONTROL_CHARACTERS, characters.remove_control_characters),
    "normalize_unicode": Rule(characters.NOT_SURELY_NFC, characters.compose),
    "unescape_html": Rule(markup.ENTITY, markup.unescape_html),
    "remove_tags": Rule(markup.MAY_HOLD_TAG, markup.remove_tags),
    "remove_urls": Rule(markup.MAY_HOLD_URL, markup.remove_urls),
    "normalize_whitespace": Rule(characters.UNTIDY_WHITESPACE, characters.normalize_whitespace),
}
RULES_OF_CHARACTERS = 3  # the first three rules, which change only texts with unusual characters


@cache
def rules(options: CleaningOptions = DEFAULT_OPTIONS) -> dict[str, Rule]:
    """Return the rules for these options by name, in order; a rule that differs from the default has its own name."""
    instead = {}
    if options.unicode_form == "NFKC":
        rule = Rule(characters.NOT_ASCII, characters.compose_compatibly)
        instead["normalize_unicode"] = ("normalize_unicode_compatibly", rule)
    if options.newlines == "space":
        one_line = partial(characters.normalize_whitespace, newlines="space")
        rule = Rule(characters.UNTIDY_WHITESPACE_OR_NEWLINE, one_line)
        instead["normalize_whitespace"] = ("normalize_whitespace_to_one_line", rule)
    return dict(instead.get(name, (name, rule)) for name, rule in RULES.items())


def rule_names(options: CleaningOptions = DEFAULT_OPTIONS) -> list[str]:
    """List the names of the rules in order; together they describe how a text was cleaned."""
    return list(rules(options))


def clean(text: pl.Expr, options: CleaningOptions = DEFAULT_OPTIONS) -> pl.Expr:
    """Apply the rules, in order, to a string column until they change nothing; nulls stay."""
    return text.map_batches(partial(_clean_series, options=options), return_dtype=pl.String, is_elementwise=True)


def clean_text(text: str, options: CleaningOptions = DEFAULT_OPTIONS) -> str:
    """Clean a single string in the same way as a corpus."""
    return _clean_series(pl.Series([text], dtype=pl.String), options).item()


@cache
def _whole(options: CleaningOptions) -> Rule:
    """Combine all rules into one that applies them once, in order."""
    in_order = list(rules(options).values())
    # Few texts have unusual characters, so one search for any of them saves a search per rule.
    of_characters, others = in_order[:RULES_OF_CHARACTERS], in_order[RULES_OF_CHARACTERS:]
    steps = [Rule(characters.UNUSUAL_CHARACTERS, partial(_apply_in_order, of_characters)), *others]
    return Rule("|".join(rule.pattern for rule in in_order), partial(_apply_in_order, steps))


def _apply_in_order(rules: list[Rule], texts: pl.Series) -> pl.Series:
    for rule in rules:
        texts = rule.apply_where_needed(texts)
    return texts


def _clean_series(texts: pl.Series, options: CleaningOptions) -> pl.Series:
    whole = _whole(options)
    rows = texts.str.contains(whole.pattern).arg_true()
    texts = texts.clone()
    # The result of one rule may need another (`&am&shy;p;lt;p>`), so the rules repeat until they no longer change a row.
    # The loop terminates: no rule undoes another, and every rule except composing shortens a text or simplifies its
    # spaces.
    while not rows.is_empty():
        before = texts.gather(rows)
        after = whole.apply(before)
        texts.scatter(rows, after)
        rows = rows.filter((after != before) & after.str.contains(whole.pattern))
    return texts

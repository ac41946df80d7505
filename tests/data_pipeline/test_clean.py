import unicodedata

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import clean
from data_pipeline.clean import RULES, clean_text

CASES = {
    "remove_control_characters": [
        ("a\x00b\x1f\x7f\x9fc", "abc"),
        ("zero\u200bwidth\u200d \ufeffmark so\u00adft \u202eright\u2066", "zerowidth mark soft right"),
        ("kept\n\tlines", "kept\n\tlines"),
    ],
    "normalize_unicode": [("e\u0301", "é"), ("x² ½ ﬁ", "x² ½ ﬁ")],
    "unescape_html": [
        ("a &lt; b &amp; c", "a < b & c"),
        ("&amp;amp;lt;p&amp;gt;", "<p>"),
        ("&#960; &#x3c0; &pi;", "π π π"),
        ("&amp;" + "amp;" * 1000 + "lt;", "<"),
        ("a&#8203;b", "ab"),
        ("f(int &parameter) a && b &nosuchthing; &copy2", "f(int &parameter) a && b &nosuchthing; &copy2"),
    ],
    "remove_urls": [
        ("see https://example.org/a_(b)?c=1&d=2.", "see."),
        ("a www.example.org b", "a b"),
        ("read [the proof](http://example.org/x 'title') now", "read the proof now"),
        ("[![a plot](http://example.org/i.png)](http://example.org)", "a plot"),
        ("so (http://example.org) it [](https://example.org) is <http://example.org>", "so it  is"),
        ("[http://example.org](http://example.org)", ""),
        ("call f() and g[] with [a](b) in https:// form", "call f() and g[] with [a](b) in https:// form"),
    ],
    "normalize_whitespace": [
        ("  a \t\u00a0 b\u2003c ", "a b c"),
        ("a \r\n\r\n \r\n\n b\rc\u2028d", "a\n\nb\nc\nd"),
    ],
}
FORMULAS = [
    r"$\frac{a}{b} < \sqrt[3]{x^2 + y_{1}} \le 10^{-3}$",
    "a < b, x<y>z and 2 > 1, f(x) = [0, 1) ∪ (2, 3]",
    "\\begin{aligned} x &= 1 \\\\ y &\\not= 2 \\end{aligned}\nf'(x) & g'(x)",
    r"\[ \int_0^\infty e^{-x}\,dx = 1 \] \href{}{}",
    "x² + y³ ≠ ½, ∀ε>0 ∃δ: |x−a|<δ",
]
# Pieces that rules make from each other: references, accents, URLs, brackets and all kinds of white space.
PIECES = st.sampled_from(
    ["&", "amp;", "lt;", "lt", "opf;", "#", "x26;", "#8203;", ";", "\u037e", "e", "\u0301", "K", "\u212a"]
    + ["http://", "www.", "a.b", "/", "[", "]", "(", ")", "](", "<", ">", "!", ".", "\u00ad", "\u200b"]
    + [" ", "\n", "\r", "\t", "\u00a0", "\u2028", "\x85", "\x0b", "\x1c"]
)


@pytest.mark.parametrize(
    ("rule", "dirty", "expected"), [(rule, *case) for rule, cases in CASES.items() for case in cases]
)
def test_rule_gives(rule, dirty, expected):
    assert pl.DataFrame({"text": [dirty]}).select(RULES[rule](pl.col("text"))).item() == expected


def test_every_rule_has_its_cases():
    assert CASES.keys() == RULES.keys()


def test_what_one_rule_makes_another_still_cleans():
    assert clean_text("&lt\u037e") == "<"  # a Greek question mark, which NFC makes a semicolon
    assert clean_text("&\u212aopf;") == "𝕂"
    assert clean_text("&am&shy;p;lt;") == "<"
    assert clean_text("&l[t;](http://example.org)") == "<"
    assert clean_text("e[\u0301](http://example.org)") == "é"


@pytest.mark.parametrize("formula", FORMULAS)
def test_mathematics_stays_byte_for_byte(formula):
    assert clean_text(formula).encode() == formula.encode()


@settings(max_examples=1500, deadline=None)
@given(st.lists(PIECES | st.characters(exclude_categories=["Cs"]), max_size=25).map("".join))
def test_cleaning_is_idempotent_and_leaves_no_dirt(text):
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(c == "\x00" or (unicodedata.category(c) == "Cc" and c != "\n") for c in cleaned)


def test_a_column_is_cleaned_as_its_rows_are_one_by_one():
    texts = [dirty for cases in CASES.values() for dirty, _ in cases] + FORMULAS + [""]
    column = pl.DataFrame({"text": texts}).select(clean.clean(pl.col("text")))["text"].to_list()
    assert column == [clean_text(text) for text in texts]

"""What holds for every text: cleaning again changes nothing, and no dirt is left."""

import re
import unicodedata

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning import clean
from data_pipeline.cleaning.clean import RULES, CleaningOptions, clean_text, rules
from data_pipeline.cleaning.protection import protect

# Pieces that rules make from each other: references, accents, mojibake, tags, URLs, brackets and all kinds of space.
PIECES = st.sampled_from(
    [
        "&",
        "amp;",
        "lt;",
        "gt;",
        "lt",
        "opf;",
        "#",
        "x26;",
        "#8203;",
        "shy;",
        "nbsp;",
        "Atilde;",
        ";",
        "\u037e",
        "＆",
        "；",
    ]
    + ["e", "\u0301", "\u0327", "K", "\u212a", "\u1112", "\u1161", "ﬁ", "²", "×", "x"]
    + ["Ã", "¯", "â", "€", "™", "â€™", "Ã\u00ad", "Ã\u00a0", "\x92", "Â", "°", "Å", "Ã ", "ðŸ", "˜€", "Ã¢â‚¬â„¢"]
    + [
        "<",
        ">",
        "<p>",
        "</p>",
        "<b>",
        "</b>",
        "<br/>",
        "<sup>",
        "</sup>",
        "<a href=",
        "'",
        '"',
        "</",
        "/>",
        "<s>",
        "＜",
        "＞",
    ]
    + ["p", "b", "`", "``", "```", "=", " class="]
    + ["http://", "www.", "a.b", "/", "[", "]", "(", ")", "](", "!", ".", "\u00ad", "\u200b"]
    + [
        "\ufdd0",
        "\ufdd1",
        "x = f(1);",
        "def f(x):",
        "$x$",
        "|",
        "$",
        "\n    ",
        "\n- ",
        "<note>",
        "</note>",
        "<code>",
        "</pre>",
    ]
    + [" ", "\n", "\r", "\t", "\u00a0", "\u2028", "\x85", "\x0b", "\x1c"]
)
TEXTS = st.lists(PIECES | st.characters(exclude_categories=["Cs"]), max_size=25).map("".join)
OPTIONS = [CleaningOptions(), CleaningOptions(unicode_form="NFKC", newlines="space")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8))
def test_cleaning_is_idempotent_and_leaves_no_dirt(options, texts):
    column = pl.DataFrame({"text": texts})
    cleaned = column.select(clean.clean(pl.col("text"), options))
    assert cleaned.select(clean.clean(pl.col("text"), options)).equals(cleaned)
    for text in cleaned["text"]:
        assert unicodedata.is_normalized(options.unicode_form, text)
        assert not any(character not in "\n\t" and unicodedata.category(character) == "Cc" for character in text)
        assert options.newlines == "keep" or not re.search(r"\n|  |^ | $", text)
    for text in protect(cleaned["text"])[0]:  # without code and other regions, which may hold dirt
        assert not re.search(r"[^\n ]  |[^\n\t ]\t| \n|\n\n\n|^\n|\s\Z|[\u00a0\u00ad\u200b\u2028]", text)
        assert not re.search(r"</[pb]>|<br/>|<p class=\"[^\"<>\ufdd0\ufdd1]*\">", text)


@pytest.mark.parametrize("rule", list(RULES | rules(OPTIONS[1])))
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8))
def test_the_pattern_of_a_rule_finds_every_text_that_the_rule_changes(rule, texts):
    rule = (RULES | rules(OPTIONS[1]))[rule]
    column = pl.Series(texts)
    assert column.filter(column != rule.clean(column)).str.contains(rule.pattern).all()


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8))
def test_what_is_taken_out_is_put_back(texts):
    protected, regions = protect(pl.Series(texts))
    assert regions.restore(protected).to_list() == texts


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abxyzpi<>=&|+-*/^_{}$\\()[] 0123456789", max_size=60))
def test_of_maths_only_white_space_and_whole_elements_change(text):
    cleaned = clean_text(text)
    if "</" not in text and not re.search(r"<[pabi]\b", text):
        assert re.sub(" +", " ", cleaned) == re.sub(" +", " ", text).strip()

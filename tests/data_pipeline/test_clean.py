"""Each cleaning rule by itself, what no rule may touch, and the options."""

import subprocess
import sys
import unicodedata
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.cleaning import clean
from data_pipeline.cleaning.characters import NOT_SURELY_NFC
from data_pipeline.cleaning.clean import RULES, CleaningOptions, clean_text, rule_names, rules, without_rules
from data_pipeline.errors import DataError

CASES = {
    "fix_mojibake": [
        ("a naÃ¯ve cafÃ© doesnâ€™t say 20 Â°C", "a naïve café doesn’t say 20 °C"),
        ("scienceâ\x80\x94quantified\nÏ€, Î”x\nπØ² ≤ ∑", "science—quantified\nπ, Δx\nπØ² ≤ ∑"),
        ("Earth\x92s \x93field\x94", "Earth’s “field”"),
        ("naïve café, l’été, Ångström, “Poincaré”—the 1×2×…×n, πØ²/4, 2√±3, ∂Ω", None),
        ("itâ€™s naÃ?ve", "it’s naÃ?ve"),
        ("160.2 Å³ and “MANHÃ” and CAFÉ²", None),
        ("naÃ¯ve 160.2 Å³ lietuviÅ³", "naïve 160.2 Å³ lietuvių"),
    ],
    "remove_control_characters": [
        ("a\x00b\x1f\x7f\x9fc", "abc"),
        ("zero\u200bwidth\u200d \ufeffmark so\u00adft \u202eright\u2066", "zerowidth mark soft right"),
        ("می\u200cروم \u0915\u094d\u200d\u0937 👩\u200d🔬 🏳\ufe0f\u200d🌈", None),
        ("می \u200c a\u200c 👩\u200d!", "می  a 👩!"),
        ("kept\n\tlines", None),
    ],
    "normalize_unicode": [("e\u0301", "é"), ("x² ½ ﬁ", None), ("\u1112\u1161\u11ab \u212b", "한 Å")],
    "unescape_html": [
        ("a &lt; b &amp; c", "a < b & c"),
        ("&amp;amp;lt;p&amp;gt;", "<p>"),
        ("&#960; &#x3c0; &pi;", "π π π"),
        ("&amp;" + "amp;" * 1000 + "lt;", "<"),
        ("f(int &parameter) a && b &nosuchthing; &copy2", None),
        ("int *p = &num;\n`&lt;`\n$a &amp; b$ &alpha;", "int *p = &num;\n`&lt;`\n$a & b$ α"),
        ("the HTML entity &nbsp; is not a&nbsp;space", "the HTML entity &nbsp; is not a\u00a0space"),
    ],
    "remove_tags": [
        ("<p>One<br>two<br/>three</p><P>four</P>", "\nOne\ntwo\nthree\n\nfour\n"),
        ("It holds.<p>Now <b>b<i>i</i></b> and <em class=x>e</em>.", "It holds.\nNow bi and e."),
        ("<a href=\"http://example.org/?a=1&b=2\" rel='nofollow'>the proof</a>", "the proof"),
        ("<table><tr><td>1</td><td>2</td></tr></table>", "\n\n 1  2 \n\n"),
        ("10<sup>-3</sup> H<sub>2</sub>O <sup>a note</sup>", "10^{-3} H_{2}O a note"),
        ("if a<b>c, then <b>so</b>", "if a<b>c, then so"),
        ("<s>, </s>, <mask>, <sep>, <pad>, <username>, <link> and <s>text</s>", None),
        ("a < b, x<y>z, a<b>c, x<p>y, i <a> j, <x, y>, <p| and |p>, 1<i and j>2", None),
        ("vector<int> v; List<String> l; Map<Object, Time>; List<Code>; Set<a>; #include <stdio.h>", None),
        ("write to <a@b.c> or <p@example.org>; if (a <b && c> d) <i size>", None),
        ("`<p>` and ``<b>`x`</b>`` or\n```html\n<p>\n<br>\n```", None),
        ("<Table><Code>XML</Code></Table>", None),
        ("SO<sub>4</sub><sup>2-</sup>, <i>x</i><sup>2</sup>, <sup>3</sup>√8", "SO_{4}^{2-}, x^{2}, ^{3}√8"),
        ("real. <p> = 0", None),
        ("a <code>&lt;b&gt;</code> b", "a `<b>` b"),
        ("<note><p>x</p></note>", None),
        ("<form>, <script>x</script>, <Div>, < p>, <p class=>", None),
    ],
    "remove_urls": [
        ("see https://example.org/a_(b)?c=1&d=2.", "see."),
        ("a www.example.org b", "a b"),
        ("read [the proof](http://example.org/x 'title') now", "read the proof now"),
        ("[![a plot](http://example.org/i.png)](http://example.org)", "a plot"),
        ("so (http://example.org) it [](https://example.org) is <http://example.org>", "so it  is"),
        ("[http://example.org](http://example.org)", ""),
        ("call f() and g[] with [a](b) in https:// form", None),
        ("详见https://zh.example.org/wiki/勾股。所以", "详见勾股。所以"),
        ("参考（https://example.org/a）得", "参考得"),
        ("fetch('https://example.org',a) and git clone https://example.org/a.git b", None),
        ("at\n\n    x = get(https://example.org)\n    y = 2", None),
    ],
    "normalize_whitespace": [
        ("  a \t\u00a0 b\u2003c ", "a b c"),
        ("a \r\n\r\n \r\n\n b\rc\u2028d", "a\n\nb\nc\nd"),
        ("a \n \n b\n", "a\n\nb"),
        ("a\n\n\nb", "a\n\nb"),
        ("- a  b\n  - c\n\t- d\te  ", "- a b\n  - c\n\t- d e"),
        ("```\n a  b\r\n\n\n```", "```\n a  b\n\n\n```"),
        ("a  b\n\n| a  | b |\n|----|---|", "a b\n\n| a  | b |\n|----|---|"),
    ],
    "normalize_unicode_compatibly": [("x² ½ ﬁ e\u0301 ＜", "x2 1⁄2 fi é <")],
    "normalize_whitespace_to_one_line": [("\n a \t\u00a0 b\r\n\n\n c\u2029d \n", "a b c d")],
}
CORPUS = Path(__file__).parents[3] / "shared" / "data" / "webinstruct_dev"
OTHER_OPTIONS = CleaningOptions(unicode_form="NFKC", newlines="space")
ALL_RULES = RULES | rules(OTHER_OPTIONS)
FORMULAS = [
    r"$\frac{a}{b} < \sqrt[3]{x^2 + y_{1}} \le 10^{-3}$",
    "a < b, x<y>z and 2 > 1, f(x) = [0, 1) ∪ (2, 3]",
    "\\begin{aligned} x &= 1 \\\\ y &\\not= 2 \\end{aligned}\nf'(x) & g'(x)",
    r"\[ \int_0^\infty e^{-x}\,dx = 1 \] \href{}{}",
    "x² + y³ ≠ ½, ∀ε>0 ∃δ: |x−a|<δ",
    r"$a<b>c$, $p<q$, $i<u>v$, \(x<p>y\), $\langle p|q\rangle$ and $<p>$, ``quoted''",
    "πØ²/4 ± 2·10⁻³ m×…, ∂Ω ≈ ∑ÂÃ, 3 Å, 20 °C, √±x, µ²",
    "vector<int>, List<String>, Map<a, b>, #include <stdio.h>, <a@b.c>, a&&b, f(int &copy, &lt)",
]


@pytest.mark.parametrize(
    ("rule", "dirty", "expected"), [(rule, *case) for rule, cases in CASES.items() for case in cases]
)
def test_rule_gives(rule, dirty, expected):
    cleaned = pl.DataFrame({"text": [dirty]}).select(ALL_RULES[rule](pl.col("text"))).item()
    assert cleaned == (dirty if expected is None else expected)


def test_every_rule_has_its_cases():
    assert CASES.keys() == ALL_RULES.keys()


@pytest.mark.parametrize("rule", [name for name in ALL_RULES if "normalize" in name or "control" in name])
def test_the_pattern_of_a_rule_finds_every_character_that_the_rule_changes(rule):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = pl.Series([f"a{character}b" for character in characters])
    changed = texts.filter(texts != ALL_RULES[rule].clean(texts))
    assert len(changed) > 15 and changed.str.contains(ALL_RULES[rule].pattern).all()


def test_the_pattern_of_nfc_finds_every_character_that_composes_or_moves():
    # A character that is NFC by itself may still compose with the one before (a decomposition's second) or move (a
    # mark with a combining class).
    composed = (unicodedata.decomposition(chr(code)) for code in range(0x110000))
    seconds = {chr(int(parts.split()[1], 16)) for parts in composed if parts and parts[0] != "<" and " " in parts}
    seconds |= {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    moving = {chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))}
    found = pl.Series(sorted(seconds | moving)).str.contains(NOT_SURELY_NFC)
    assert len(found) > 900 and found.all()


def test_what_one_rule_makes_another_still_cleans():
    assert clean_text("&lt\u037e") == "<"  # a Greek question mark, which NFC makes a semicolon
    assert clean_text("&\u212aopf;") == "𝕂"
    assert clean_text("&am&shy;p;lt;") == "<"
    assert clean_text("&l[t;](http://example.org)") == "<"
    assert clean_text("e[\u0301](http://example.org)") == "é"
    assert clean_text("a&#8203;b") == "ab"
    assert clean_text("&lt;p&gt;a&amp;lt;br&amp;gt;b&lt;/p&gt;") == "a\nb"
    assert clean_text("<<b>p</b>>a</p>") == "a"
    assert clean_text('&lt;a href="http://example.org/x"&gt;here&lt;/a&gt;') == "here"
    assert clean_text("caf&Atilde;&copy; doesn&acirc;&euro;&trade;t") == "café doesn’t"
    assert clean_text("so.&nbsp;<p>Now") == "so.\nNow"


@pytest.mark.parametrize("formula", FORMULAS)
def test_mathematics_and_code_stay_byte_for_byte(formula):
    assert clean_text(formula).encode() == formula.encode()


def test_the_options_choose_and_name_the_rules():
    assert rule_names() == list(RULES)
    assert clean_text("x² ﬁ\n\na", CleaningOptions(unicode_form="NFKC")) == "x2 fi\n\na"
    assert clean_text("x² ﬁ\n\n<p>a</p>b", CleaningOptions(newlines="space")) == "x² ﬁ a b"
    assert clean_text("＜p＞a＜/p＞\n\n&amp；lt；", OTHER_OPTIONS) == "a <"
    assert set(rule_names(OTHER_OPTIONS)) - set(RULES) == {
        "normalize_unicode_compatibly",
        "normalize_whitespace_to_one_line",
    }


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_can_be_switched_off_and_on_by_name(rule):
    off = CleaningOptions(without=without_rules([f"no_{rule}"]))
    on = CleaningOptions(without=without_rules([rule]))
    assert rule_names(off) == [name for name in RULES if name != rule]
    assert rule_names(on) == [rule]
    dirty = next(dirty for dirty, expected in CASES[rule] if expected is not None)
    assert clean_text(dirty, on) != dirty
    assert clean_text(dirty, off) != clean_text(dirty)


def test_no_rule_changes_nothing():
    none = CleaningOptions(without=without_rules(["none"]))
    assert rule_names(none) == []
    assert all(clean_text(dirty, none) == dirty for cases in CASES.values() for dirty, _ in cases)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (["remove_everything"], "no cleaning rule 'remove_everything': the rules are fix_mojibake, "),
        (["no_tags"], "no cleaning rule 'tags'"),
        (["remove_tags", "no_remove_urls"], "the cleaning rules are remove_tags no_remove_urls: name"),
    ],
)
def test_rules_that_make_no_sense_are_refused(choice, sentence):
    with pytest.raises(DataError, match=sentence):
        without_rules(choice)


def test_an_option_of_a_rule_that_is_off_is_refused():
    with pytest.raises(DataError, match="newlines is 'space', but the rule normalize_whitespace is off"):
        CleaningOptions(newlines="space", without=("normalize_whitespace",))
    with pytest.raises(DataError, match="no cleaning rule 'tags'"):
        CleaningOptions(without=("tags",))


@pytest.mark.parametrize(("option", "value"), [("unicode_form", "NFD"), ("newlines", "drop")])
def test_an_option_that_does_not_exist_is_refused_by_name(option, value):
    with pytest.raises(DataError, match=f"{option} is '{value}'.*or"):
        CleaningOptions(**{option: value})


def test_a_column_is_cleaned_as_its_rows_are_one_by_one_and_the_original_stays():
    texts = [dirty for cases in CASES.values() for dirty, _ in cases] + FORMULAS + [""]
    frame = pl.DataFrame({"text": [*texts, None]})
    column = frame.select(clean.clean(pl.col("text")))["text"].to_list()
    assert column == [*(clean_text(text) for text in texts), None]
    assert frame["text"].to_list() == [*texts, None]
    for rule in RULES.values():
        frame.select(rule(pl.col("text")))
        assert frame["text"].to_list() == [*texts, None]


def test_texts_without_dirt_cost_no_import_of_ftfy():
    code = (
        "import sys; from data_pipeline.cleaning.clean import clean_text; clean_text('naïve &lt;p> http://a.b'); "
        "assert 'ftfy' not in sys.modules; clean_text('naÃ¯ve'); assert 'ftfy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_real_corpus_is_clean_once_cleaned():
    if not CORPUS.is_dir():
        pytest.skip(f"the corpus is not at {CORPUS}")
    dirty = pl.read_parquet(next(iter(sorted(CORPUS.glob("*.parquet")))), columns=["question", "answer"])
    once = dirty.select(clean.clean(pl.all()))
    assert once.select(clean.clean(pl.all())).equals(once)
    changed = (dirty["answer"] != once["answer"]).sum()
    assert 0.1 * len(dirty) < changed < 0.5 * len(dirty)

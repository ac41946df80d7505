"""Every figure on generated answers matches a case worked by hand."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.tools.evaluation import results
from launcher.tools.evaluation.text_metrics import bleu, distinct, meteor, rouge, text_metrics

README = Path(results.__file__).with_name("README.md")
WORDNET = Path(__file__).parents[4] / "shared" / "data" / "nltk_data"


def test_the_page_of_metrics_is_made_from_their_declarations():
    page = README.read_text(encoding="utf-8")
    assert results.page_table() in page, "put the output of `python -m launcher.tools.evaluation.results` there"


def test_a_metric_that_does_not_apply_says_why():
    found = text_metrics(["a"], ["b"], rouge(["a"], ["b"]))
    missing = [name for name, value in found.items() if value is None and name != "meteor"]
    assert missing == ["bleu", "rouge2", "distinct_2", "distinct_3"]
    assert all(results.METRICS[name].without for name in (*missing, "meteor", "sequence_accuracy"))


def test_exact_match_and_lengths():
    given, expected = ["a b", "c\n", "d e f", ""], ["a b", " c", "d e", "x"]
    metrics = text_metrics(given, expected, rouge(given, expected))
    assert metrics["exact_match"] == 2 / 4  # except for white space around them
    assert metrics["average_length"] == (2 + 1 + 3 + 0) / 4
    assert metrics["average_expected_length"] == (2 + 1 + 2 + 1) / 4


def test_distinct_n_grams_are_counted_over_all_answers():
    answers = ["a b a b", "a b c"]
    assert distinct(answers, 1) == 3 / 7  # a, b, c
    assert distinct(answers, 2) == 3 / 5  # ab, ba, bc of ab ba ab ab bc
    assert distinct(answers, 3) == 3 / 3  # aba, bab, abc
    assert distinct(["one", "two"], 2) is None


def test_bleu_matches_a_case_worked_by_hand():
    # Of 6 words 5 match, of 5 pairs 3, of 4 triples 1, of 3 fours none, smoothed to half a one; both have 6 words.
    precisions = [5 / 6, 3 / 5, 1 / 4, 1 / 6]
    expected = 100 * math.prod(precisions) ** (1 / 4)
    assert bleu(["the cat is on a mat"], ["the cat sat on a mat"]) == pytest.approx(expected)
    # Every word is right but half of them are missing: only the brevity penalty counts.
    assert bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(100 * math.exp(1 - 8 / 4))


def test_bleu_and_rouge_cannot_score_some_right_answers():
    """launcher/tools/evaluation/README.md documents this."""
    assert bleu(["12", "Lima"], ["12", "Lima"]) is None
    assert rouge(["北京"], ["北京"]) == [{"rouge1": 0, "rouge2": 0, "rouge_l": 0}]


def test_rouge_matches_a_case_worked_by_hand():
    # Of 4 and 5 words 3 are common, of 3 and 4 pairs 1 ("the cat"); the longest common subsequence is "the cat mat".
    (score,) = rouge(["the cat likes mat"], ["the cat on the mat"])
    assert score["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert score["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert score["rouge_l"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    (turned,) = rouge(["mat cat the"], ["the cat mat"])
    assert turned["rouge1"] == 1
    assert turned["rouge_l"] == pytest.approx(1 / 3)


def test_meteor_of_words_without_synonyms_matches_cases_worked_by_hand():
    # All 3 words are among the 6 of the right answer, in one run: F = PR / (0.9 P + 0.1 R), penalty 0.5 · (1/3)³.
    f_mean = (1 * 0.5) / (0.9 * 1 + 0.1 * 0.5)
    assert meteor(["a cat sat"], ["a cat sat on the mat"]) == [pytest.approx(f_mean * (1 - 0.5 / 27))]
    # "cats" has the stem of "cat". There are two runs of words, because the right answer has "a" between them.
    f_mean = (1 * 2 / 3) / (0.9 * 1 + 0.1 * 2 / 3)
    assert meteor(["cats mat"], ["cat a mat"]) == [pytest.approx(f_mean * (1 - 0.5 * (2 / 2) ** 3))]


@pytest.mark.slow
def test_meteor_knows_synonyms_if_wordnet_is_available():
    folder = os.environ.get("NLTK_DATA") or str(WORDNET)
    if not Path(folder).is_dir():
        pytest.skip(f"NLTK_DATA is not set and there is no {WORDNET}")
    code = "from launcher.tools.evaluation.text_metrics import meteor; print(meteor(['the auto'], ['the car'])[0])"
    environment = {**os.environ, "NLTK_DATA": folder}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert float(result.stdout) == pytest.approx(1 - 0.5 / 8), result.stderr


def test_without_wordnet_only_meteor_is_missing():
    code = (
        "import json; from launcher.tools.evaluation.text_metrics import rouge, text_metrics as t; "
        "print(json.dumps(t(['a'], ['b'], rouge(['a'], ['b']))))"
    )
    environment = {**os.environ, "NLTK_DATA": "/nowhere", "HOME": "/nowhere"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert '"meteor": null' in result.stdout, result.stderr
    assert "NaN" not in result.stdout
    assert result.stdout.count(":") == 11

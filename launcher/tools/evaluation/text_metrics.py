"""Compare generated answers with the expected ones, using the reference libraries for BLEU, ROUGE and METEOR.

In every function, `given` are the generated answers and `expected` the expected ones, equally many and at least one.
Means are over answers. BLEU and the distinct n-grams are computed over all answers together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from launcher.tools.evaluation.metric import Metric

NO_WORDNET = (
    "METEOR is skipped: NLTK finds no WordNet; set NLTK_DATA to a folder with corpora/wordnet.zip "
    "(`python -m nltk.downloader -d FOLDER wordnet` creates one)"
)
ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}


@dataclass(frozen=True)
class Answers:
    """Generated and expected answers, and the result of `rouge` for each pair."""

    given: Sequence[str]
    expected: Sequence[str]
    scored: Sequence[dict[str, float]]


def text_metrics(
    given: Sequence[str], expected: Sequence[str], scored: Sequence[dict[str, float]]
) -> dict[str, float | None]:
    """Return all of `TEXT_METRICS` by name. `scored` is the result of `rouge`."""
    answers = Answers(given, expected, scored)
    return {name: metric.compute(answers) for name, metric in TEXT_METRICS.items()}


def is_exact(given: str, expected: str) -> bool:
    """Whether the texts are equal, ignoring leading and trailing white space."""
    return given.strip() == expected.strip()


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Return distinct word n-grams divided by all word n-grams of the texts (Li et al. 2016); None if there are none."""
    grams = [gram for text in texts for words in [text.split()] for gram in zip(*(words[i:] for i in range(n)))]  # noqa: B905
    return len(set(grams)) / len(grams) if grams else None


def bleu(given: Sequence[str], expected: Sequence[str]) -> float | None:
    """Return corpus BLEU, 0 to 100, with sacrebleu's defaults (13a tokenizer, exponential smoothing).

    BLEU multiplies the precisions of 1- to 4-grams, so it is None if no given answer has four words.
    """
    from sacrebleu.metrics import BLEU

    found = BLEU().corpus_score(list(given), [list(expected)])
    return None if 0 in found.totals else found.score


def rouge(given: Sequence[str], expected: Sequence[str]) -> list[dict[str, float]]:
    """Return for each answer the F1 of common words, word pairs, and the longest common subsequence of words."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    scores = [scorer.score(right, text) for text, right in zip(given, expected, strict=True)]
    return [{ours: score[theirs].fmeasure for theirs, ours in ROUGE.items()} for score in scores]


def has_wordnet() -> bool:
    """Whether NLTK finds WordNet in `NLTK_DATA` or its default folders."""
    import nltk

    for name in ("corpora/wordnet.zip", "corpora/wordnet"):
        try:
            nltk.data.find(name)
            return True
        except LookupError:
            continue
    return False


def meteor(given: Sequence[str], expected: Sequence[str]) -> list[float]:
    """Return METEOR of each answer, 0 to 1 (Banerjee & Lavie 2005, NLTK's parameters), on words and punctuation.

    Words match by spelling, then by stem, then as WordNet synonyms. Raises `LookupError` if unmatched words remain and
    WordNet is missing.
    """
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.meteor_score import meteor_score

    return [
        meteor_score([wordpunct_tokenize(right)], wordpunct_tokenize(text))
        for text, right in zip(given, expected, strict=True)
    ]


def mean(values: Iterable[float]) -> float:
    """Return the mean. The sum is exact, so it does not depend on the order of the values."""
    values = list(values)
    return math.fsum(values) / len(values)


def _exact_match(answers: Answers) -> float:
    return mean(is_exact(*pair) for pair in zip(answers.given, answers.expected, strict=True))


def _mean_rouge(kind: str) -> Callable[[Answers], float]:
    return lambda answers: mean(score[kind] for score in answers.scored)


def _rouge2(answers: Answers) -> float | None:
    has_pairs = any(len(text.split()) > 1 for text in answers.expected)
    return _mean_rouge("rouge2")(answers) if has_pairs else None


def _meteor(answers: Answers) -> float | None:
    return mean(meteor(answers.given, answers.expected)) if has_wordnet() else None


def _distinct(n: int) -> Callable[[Answers], float | None]:
    return lambda answers: distinct(answers.given, n)


def _words(texts: Sequence[str]) -> float:
    return mean(len(text.split()) for text in texts)


NGRAMS = "distinct word n-grams divided by all word n-grams, in all answers together: n = "
TEXT_METRICS: dict[str, Metric[Answers]] = {
    "exact_match": Metric(
        "exact match", "{:.2%}",
        "the share of greedily generated answers that equal the expected one, ignoring white space around them",
        _exact_match,
    ),
    "bleu": Metric(
        "BLEU (0 to 100)", "{:.2f}", "sacrebleu, over all answers, 0 to 100",
        lambda answers: bleu(answers.given, answers.expected), "no answer has 4 words",
    ),
    "rouge1": Metric("ROUGE-1", "{:.4f}", "rouge-score's F1 of words, averaged over answers", _mean_rouge("rouge1")),
    "rouge2": Metric("ROUGE-2", "{:.4f}", "the same of pairs of words", _rouge2, "no answer has 2 words"),
    "rouge_l": Metric("ROUGE-L", "{:.4f}", "the same of the longest common subsequence", _mean_rouge("rouge_l")),
    "meteor": Metric(
        "METEOR", "{:.4f}",
        "NLTK's METEOR, averaged over answers; without WordNet (`NLTK_DATA`) it is null and a message says so",
        _meteor, "needs WordNet",
    ),
    "distinct_1": Metric("distinct words", "{:.4f}", f"{NGRAMS}1", _distinct(1), "no words"),
    "distinct_2": Metric("distinct pairs of words", "{:.4f}", f"{NGRAMS}2", _distinct(2), "no answer has 2 words"),
    "distinct_3": Metric("distinct triples of words", "{:.4f}", f"{NGRAMS}3", _distinct(3), "no answer has 3 words"),
    "average_length": Metric(
        "words per generated answer", "{:.2f}", "words per generated answer", lambda answers: _words(answers.given)
    ),
    "average_expected_length": Metric(
        "words per expected answer", "{:.2f}", "words per expected answer", lambda answers: _words(answers.expected)
    ),
}  # fmt: skip

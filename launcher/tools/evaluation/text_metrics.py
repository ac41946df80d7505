"""Compare generated answers with the expected ones, using the reference libraries for BLEU, ROUGE and METEOR.

In every function, `given` are the generated answers and `expected` the expected ones, equally many and at least one.
Means are over answers. BLEU and the distinct n-grams are computed over all answers together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NO_WORDNET = (
    "METEOR is skipped: NLTK finds no WordNet; set NLTK_DATA to a folder with corpora/wordnet.zip "
    "(`python -m nltk.downloader -d FOLDER wordnet` creates one)"
)
ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}


def text_metrics(
    given: Sequence[str], expected: Sequence[str], scored: Sequence[dict[str, float]]
) -> dict[str, float | None]:
    """Return all metrics of this module, by name. `scored` is the result of `rouge`.

    `meteor` is None without WordNet. A metric over n-grams is None if no answer has n words.
    """
    has_pairs = any(len(text.split()) > 1 for text in expected)
    means = {name: mean(score[name] for score in scored) for name in ROUGE.values()}
    return {
        "exact_match": mean(is_exact(*pair) for pair in zip(given, expected, strict=True)),
        "bleu": bleu(given, expected),
        **means | ({} if has_pairs else {"rouge2": None}),
        "meteor": mean(meteor(given, expected)) if has_wordnet() else None,
        **{f"distinct_{n}": distinct(given, n) for n in (1, 2, 3)},
        "average_length": mean(len(text.split()) for text in given),
        "average_expected_length": mean(len(text.split()) for text in expected),
    }


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

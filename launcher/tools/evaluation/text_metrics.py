"""How near generated answers come to the right ones; from kept libraries where the definition is theirs.

Legend of all: `given` the generated answers, `expected` the right ones, as many. Means are over answers, BLEU and the
distinct n-grams over all of them together. An empty collection has no figures: callers ask for at least one answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NO_WORDNET = (
    "METEOR is left out: NLTK finds no WordNet; set NLTK_DATA to a folder with corpora/wordnet.zip "
    "(`python -m nltk.downloader -d FOLDER wordnet` makes one)"
)
ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}


def text_metrics(
    given: Sequence[str], expected: Sequence[str], scored: Sequence[dict[str, float]]
) -> dict[str, float | None]:
    """All the figures of this file, by name; `scored` is what `rouge` finds.

    None: `meteor` without WordNet, and what counts several words in a row where no answer has as many.
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
    """The same text, but for space around it."""
    return given.strip() == expected.strip()


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams of words, in all texts together (Li et al. 2016); None without any."""
    grams = [gram for text in texts for words in [text.split()] for gram in zip(*(words[i:] for i in range(n)))]  # noqa: B905
    return len(set(grams)) / len(grams) if grams else None


def bleu(given: Sequence[str], expected: Sequence[str]) -> float | None:
    """BLEU of the whole collection, 0 to 100, as sacrebleu has it by default (13a words, exponential smoothing).

    It multiplies shares of one to four words in a row: None if no given answer has four words.
    """
    from sacrebleu.metrics import BLEU

    found = BLEU().corpus_score(list(given), [list(expected)])
    return None if 0 in found.totals else found.score


def rouge(given: Sequence[str], expected: Sequence[str]) -> list[dict[str, float]]:
    """F1 of common words, pairs of words, and the longest common subsequence of words, of each answer."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    scores = [scorer.score(right, text) for text, right in zip(given, expected, strict=True)]
    return [{ours: score[theirs].fmeasure for theirs, ours in ROUGE.items()} for score in scores]


def has_wordnet() -> bool:
    """Whether NLTK finds WordNet: in the folders of `NLTK_DATA`, or where it looks by itself."""
    import nltk

    for name in ("corpora/wordnet.zip", "corpora/wordnet"):
        try:
            nltk.data.find(name)
            return True
        except LookupError:
            continue
    return False


def meteor(given: Sequence[str], expected: Sequence[str]) -> list[float]:
    """METEOR of each answer (Banerjee & Lavie 2005, NLTK's parameters), on words and signs, 0 to 1.

    Words count as the same by spelling, then by stem, then as synonyms of WordNet: raises `LookupError` where words are
    left over and there is none.
    """
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.meteor_score import meteor_score

    return [
        meteor_score([wordpunct_tokenize(right)], wordpunct_tokenize(text))
        for text, right in zip(given, expected, strict=True)
    ]


def mean(values: Iterable[float]) -> float:
    """The mean; its sum is exact, so that no order of adding can show."""
    values = list(values)
    return math.fsum(values) / len(values)

"""The rows for measuring preparation: real ones, or made-up text that is the same on every machine."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.sample import training_rows
from data_pipeline.sources.source import open_source
from data_pipeline.tokens.tokenizer import train_tokenizer
from tests.benchmarks.measurement import Options

ROWS, QUICK_ROWS = 60_000, 6_000  # 54 and 5 MB of text
TOKENIZER_ROWS, TOKENIZER_WORDS = 2_000, 8192
VOCABULARY = 20_000  # made-up words
QUESTION_WORDS, ANSWER_WORDS = (10, 40), (20, 200)
# Of all words: those with punctuation after them, and those that are numbers.
SHARE_OF_PUNCTUATION, SHARE_OF_NUMBERS = 0.15, 0.03
BATCH_OF_ROWS = 5_000


@dataclass(frozen=True)
class Corpus:
    """Rows with `question`, `answer` and `source`, and the folder of the tokenizer that goes with them."""

    rows: pl.DataFrame
    tokenizer: Path

    @property
    def megabytes(self) -> float:
        """Question and answer text, in MB."""
        return megabytes(self.rows)


def megabytes(rows: pl.DataFrame) -> float:
    """Question and answer text, in MB."""
    return rows.select(pl.col("question", "answer").str.len_bytes().sum()).sum_horizontal().item() / 1e6


def rows_of(data: str) -> pl.DataFrame:
    """Read rows with `question`, `answer` and `source`."""
    return pl.concat(open_source(data).frames(BadRows())).rename({"prompt": "question"})


def open_corpus(options: Options) -> Corpus:
    """Read the given rows, or make some up and fit a tokenizer to a part of them; this is done once in a run."""
    if options.data is not None:
        return Corpus(rows_of(str(options.data)), options.tokenizer)
    folder = options.scratch / "corpus"
    if not folder.exists():
        folder.mkdir()
        rows = made_up_rows(QUICK_ROWS if options.quick else ROWS)
        rows.write_parquet(folder / "rows.parquet")
        _fit_tokenizer(rows.head(TOKENIZER_ROWS), folder / "tokenizer")
    return Corpus(pl.read_parquet(folder / "rows.parquet"), folder / "tokenizer")


def _fit_tokenizer(rows: pl.DataFrame, folder: Path) -> None:
    """Fit a tokenizer of LED's kind to some rows."""
    texts = (text for row in rows.select("question", "answer").iter_rows() for text in row)
    # gigatoken does not support split digits, which the sample's tokenizer has, and prepare would encode slowly.
    train_tokenizer(texts, TOKENIZER_WORDS, split_digits=False).save(folder)


def made_up_rows(count: int) -> pl.DataFrame:
    """Return questions of the built-in sample, not cleaned, each continued in words of a made-up language.

    Words are as frequent as in natural text (Zipf's law), and no row is like another.
    """
    generator = np.random.default_rng(0)
    words, probabilities = _vocabulary(generator)
    sample = itertools.cycle(list(training_rows()))
    columns: dict[str, list[str]] = {"question": [], "answer": [], "source": []}
    for first in range(0, count, BATCH_OF_ROWS):
        size = min(BATCH_OF_ROWS, count - first)
        lengths = np.stack([generator.integers(*limits, size) for limits in (QUESTION_WORDS, ANSWER_WORDS)])
        drawn = iter(words[generator.choice(len(words), lengths.sum(), p=probabilities)])
        for row, (of_question, of_answer) in zip(itertools.islice(sample, size), lengths.T.tolist(), strict=True):
            columns["question"].append(" ".join([row["question"], *itertools.islice(drawn, of_question)]))
            columns["answer"].append(" ".join([row["answer"], *itertools.islice(drawn, of_answer)]))
            columns["source"].append(row["source"])
    return pl.DataFrame(columns)


def _vocabulary(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return words (some with punctuation, some numbers) and the probability of each."""
    syllables = np.array([first + second for first in "bdfghjklmnprstvw" for second in ("a", "e", "i", "o", "u", "en")])
    # The most frequent words are the shortest.
    lengths = np.minimum(1 + np.log10(1 + np.arange(VOCABULARY)).astype(int), 4)
    plain = ["".join(generator.choice(syllables, length)) for length in lengths]
    numbers = [str(number) for number in range(1000)]
    words = np.array([*plain, *(f"{word}." for word in plain), *(f"{word}," for word in plain), *numbers], dtype=object)
    zipf = 1 / (2.7 + np.arange(VOCABULARY))
    zipf *= (1 - SHARE_OF_NUMBERS) / zipf.sum()
    punctuated = zipf * SHARE_OF_PUNCTUATION / 2
    of_number = np.full(len(numbers), SHARE_OF_NUMBERS / len(numbers))
    probabilities = np.concatenate([zipf - 2 * punctuated, punctuated, punctuated, of_number])
    return words, probabilities / probabilities.sum()

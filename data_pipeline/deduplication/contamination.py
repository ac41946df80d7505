"""Contamination: finds rows that contain a passage of an evaluation set, by its word n-grams.

The n-grams are those of GPT-3's decontamination (Brown et al. 2020, arXiv:2005.14165, appendix C): 13 words in lower case
without punctuation. A row is contaminated if it shares a single n-gram with an evaluation text. A shorter evaluation text
counts only as a whole: the row's question, or its question and answer together, must have exactly the same words.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from data_pipeline.cleaning.clean import clean
from data_pipeline.deduplication.shingles import blocks_of_words, joined, ngrams_of, short_texts_of, words_of
from data_pipeline.errors import DataError

NGRAM_WORDS = 13
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
LARGEST_FILTER = 2**26  # bytes


class EvaluationSet:
    """The n-grams of evaluation files.

    ngram_words: words per n-gram.
    fingerprint: hexadecimal sha256 of everything that decides which rows are contaminated. It does not depend on the
    files' names or on the order of their rows.
    texts: number of evaluation texts that have words.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        ngram_words: int = NGRAM_WORDS,
        cleaning: Callable[[pl.Expr], pl.Expr] = clean,
    ) -> None:
        """Read the files: jsonl (also .gz), parquet or plain text.

        - A row with a question gives two texts: the question and answer together, and the question alone.
        - A row without a question gives its `text` or, if it has none, every column of strings.
        - A plain text file gives the whole file and each of its lines.

        cleaning: the cleaning of the corpus, so that equal texts have equal words.
        Raises DataError if a file is missing, damaged, without words or of an unknown type.
        """
        if ngram_words < 1:
            raise DataError(f"contamination cannot be found with n-grams of {ngram_words} words: give 1 or more")
        files = [Path(path) for path in paths]
        if not files:
            raise DataError("no evaluation file is given: give jsonl, parquet or txt files")
        self.ngram_words = ngram_words
        self.texts = 0
        ngrams, short_texts = [], []
        for file in files:
            texts = pl.DataFrame({"text": _read(file)}, schema={"text": pl.String})
            words = words_of(texts.select(cleaning(pl.col("text"))).to_series())
            if not len(words.values):
                raise DataError(f"the evaluation file {file} holds no text: it needs a question, answer or text column")
            self.texts += int(np.count_nonzero(np.diff(words.offsets)))
            ngrams.append(ngrams_of(words, ngram_words).values)
            short_texts.append(short_texts_of(words, ngram_words)[1])
        self._ngrams = _HashSet(np.concatenate(ngrams))
        self._short_texts = _HashSet(np.concatenate(short_texts))
        digest = hashlib.sha256()
        for hashes in (self._ngrams.hashes, self._short_texts.hashes):
            digest.update(len(hashes).to_bytes(8, "little") + hashes.astype("<u8").tobytes())
        self.fingerprint = digest.hexdigest()

    def contaminated(self, question: pl.Series, answer: pl.Series) -> np.ndarray:
        """Find the rows that contain an n-gram of an evaluation text or equal a short one: bool `[rows]`."""
        found = np.zeros(len(question), dtype=bool)
        for rows, pairs in blocks_of_words(question, answer):
            block = found[rows]
            values, offsets = ngrams_of(joined(pairs), self.ngram_words)
            block[np.searchsorted(offsets, self._ngrams.find(values), side="right") - 1] = True
            for texts, texts_per_row in ((joined(pairs), 1), (pairs, 2)):
                short, values = short_texts_of(texts, self.ngram_words)
                same = short[self._short_texts.find(values)]
                # In pairs only the questions count: an answer such as `yes` is too common to show contamination.
                block[same[same % texts_per_row == 0] // texts_per_row] = True
        return found


class _HashSet:
    """A set of 64-bit hashes that looks up many values at once."""

    def __init__(self, values: np.ndarray) -> None:
        self.hashes = np.unique(values)
        # A table indexed by the upper bits rejects most values that are not in the set with a single lookup.
        size = min(1 << max(8, int(len(self.hashes) * 16).bit_length()), LARGEST_FILTER)
        self._shift = np.uint64(64 - (size.bit_length() - 1))
        self._filter = np.zeros(size, dtype=bool)
        self._filter[self.hashes >> self._shift] = True

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return the indices of the values that are in the set, int64 `[found]`."""
        maybe = np.flatnonzero(self._filter[values >> self._shift])
        if not len(maybe):
            return maybe
        place = np.searchsorted(self.hashes, values[maybe])
        return maybe[self.hashes[np.minimum(place, len(self.hashes) - 1)] == values[maybe]]


def _read(file: Path) -> list[str]:
    """Return all texts of an evaluation file."""
    if not file.is_file():
        raise DataError(f"there is no evaluation file {file}: check the path")
    if not file.name.endswith(FILE_SUFFIXES):
        raise DataError(f"the evaluation file {file} is none of {', '.join(FILE_SUFFIXES)}: convert it or rename it")
    if file.suffix == ".parquet":
        rows = _parquet_rows(file)
    elif file.suffix == ".txt":
        rows = ({"text": text} for text in _plain_texts(file))
    else:
        rows = _jsonl_rows(file)
    return [text for row in rows for text in _texts_of(row)]


def _texts_of(row: dict) -> list[str]:
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if "question" in texts:
        return [texts["question"], f"{texts['question']}\n{texts.get('answer', '')}"]
    return [texts["text"]] if "text" in texts else list(texts.values())


def _parquet_rows(file: Path) -> Iterator[dict]:
    try:
        schema = pl.read_parquet_schema(file)
        columns = [name for name, kind in schema.items() if kind == pl.String or kind == pl.Categorical]
        frame = pl.read_parquet(file, columns=columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            f"{file} is not a readable parquet file: download it again or leave it out ({error})"
        ) from error
    return frame.with_columns(pl.all().cast(pl.String)).iter_rows(named=True)


def _plain_texts(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the evaluation file {file} is not UTF-8 text: convert it to UTF-8 ({error})") from error
    return [text, *text.splitlines()]


def _jsonl_rows(file: Path) -> Iterator[dict]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{file}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be read after line {number}: download it again or leave it out ({error})"
        ) from error


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: correct or remove it ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object: every line must hold one row")
    if any(isinstance(value, str) and re.search("[\ud800-\udfff]", value) for value in row.values()):
        raise DataError(f"{where} has half a surrogate pair in a text, which is not a character: remove it")
    return row

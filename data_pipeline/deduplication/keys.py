"""Hashes of rows: what tells an exact duplicate, and on which side of the validation split a question falls."""

from __future__ import annotations

import numpy as np
import polars as pl
import xxhash

from data_pipeline.tokens.text_buffer import text_buffer

# Case of ASCII letters and kinds of white space make no difference. One byte for one byte, so that a whole column is
# normalised at the speed of memory; bytes of other characters are never in this range of UTF-8.
_NORMALISED = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\n\t", b"abcdefghijklmnopqrstuvwxyz  ")


def row_keys(question: pl.Series, answer: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Give the XXH3 hashes of rows, uint64 `[rows, 2]` of question and answer, and `[rows]` of the question alone."""
    # Cleaning leaves no NUL, so it tells where the question ends.
    buffer, offsets = text_buffer(pl.select(pl.concat_str(question, answer, separator="\0")).to_series())
    text = memoryview(buffer.tobytes().translate(_NORMALISED))
    question_ends = offsets[:-1] + question.str.len_bytes().to_numpy()
    starts, ends = offsets[:-1].tolist(), offsets[1:].tolist()
    rows = b"".join([xxhash.xxh3_128_digest(text[start:end]) for start, end in zip(starts, ends, strict=True)])
    questions = [
        xxhash.xxh3_64_intdigest(text[start:end]) for start, end in zip(starts, question_ends.tolist(), strict=True)
    ]
    return np.frombuffer(rows, dtype="<u8").reshape(-1, 2), np.array(questions, dtype=np.uint64)


def repeated(keys: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """Tell which eligible rows have the key `[rows, 2]` of an eligible row before them: bool `[rows]`.

    Takes about 32 bytes a row beside the keys.
    """
    rows = np.flatnonzero(eligible)
    # Stable sorts, the second key first: equal keys come to stand together in the rows' order.
    rows = rows[np.argsort(keys[rows, 1], kind="stable")]
    rows = rows[np.argsort(keys[rows, 0], kind="stable")]
    same = np.ones(max(len(rows) - 1, 0), dtype=bool)
    for column in (0, 1):
        values = keys[rows, column]
        same &= values[1:] == values[:-1]
    result = np.zeros(len(keys), dtype=bool)
    result[rows[1:][same]] = True
    return result

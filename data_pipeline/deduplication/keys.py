"""Hashes of rows, which identify exact duplicates and assign questions to a side of the validation split."""

from __future__ import annotations

import numpy as np
import polars as pl
import xxhash

from data_pipeline.tokens.text_buffer import text_buffer

# Ignores the case of ASCII letters and the kind of white space. Each byte maps to one byte, so that a whole column is
# normalised at memory speed. In UTF-8, the bytes of other characters never lie in this range.
_NORMALISED = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\n\t", b"abcdefghijklmnopqrstuvwxyz  ")


def row_keys(question: pl.Series, answer: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Compute XXH3 hashes of rows: uint64 `[rows, 2]` of question and answer, and `[rows]` of the question alone."""
    # A NUL separates question and answer; cleaning removes it from texts.
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
    """Find the eligible rows whose key `[rows, 2]` equals that of an earlier eligible row: bool `[rows]`.

    Uses about 32 bytes per row in addition to the keys.
    """
    rows = np.flatnonzero(eligible)
    # With stable sorts, the second column first, equal keys become adjacent and stay in row order.
    rows = rows[np.argsort(keys[rows, 1], kind="stable")]
    rows = rows[np.argsort(keys[rows, 0], kind="stable")]
    same = np.ones(max(len(rows) - 1, 0), dtype=bool)
    for column in (0, 1):
        values = keys[rows, column]
        same &= values[1:] == values[:-1]
    result = np.zeros(len(keys), dtype=bool)
    result[rows[1:][same]] = True
    return result

"""Questions with their expected answers, read back from packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows
from data_pipeline.tokens.tokenization import decode_answer

START, ANSWER_START, END, OFFSET = (SPAN_COLUMNS.index(name) for name in ("start", "answer_start", "end", "offset"))


class Rows(Protocol):
    """Packed rows by number, the interface of `data_pipeline.loading.row_reader.RowReader`."""

    num_rows: int
    pad_token_id: int
    fingerprint: str
    location: str

    def gather(self, rows: np.ndarray) -> PackedRows: ...


@dataclass(frozen=True)
class Question:
    """A question, its expected answer, and the prompt's token ids: `<s> question <sep>`."""

    question: str
    expected: str
    prompt: list[int]


def spread(count: int, limit: int | None) -> np.ndarray:
    """Return `limit` evenly spaced numbers below `count`, or all of them. Neighbouring rows tend to be alike."""
    wanted = count if limit is None else min(limit, count)
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))


def questions_in(rows: Rows, number: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Question]:
    """Yield the questions of a row: the first turn of each document that has it whole in the row.

    Of the others, a part of the question or of the answer is missing. Plain texts ask nothing.
    """
    read = rows.gather(np.array([number]))
    tokens = read.tokens[0].tolist()
    for span in read.spans:
        start, answer, end = (int(span[column]) for column in (START, ANSWER_START, END))
        is_asked = span[OFFSET] == 0 and start < answer < end and tokens[answer - 1] == tokenizer.sep_token_id
        if is_asked and tokens[end - 1] == tokenizer.eos_token_id:
            question = decode_answer(tokenizer, tokens[start + 1 : answer - 1])
            yield Question(question, decode_answer(tokenizer, tokens[answer:end]), tokens[start:answer])

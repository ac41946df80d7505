"""Held-out questions answered greedily, and how many answers are exactly right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data_pipeline.cleaning.clean import clean_text
from launcher.errors import ConfigurationError
from launcher.inference.generation import answer
from model import LiquidForCausalLM


@dataclass(frozen=True)
class Answered:
    """One held-out question, the answer it should get and the one it got."""

    question: str
    expected: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given.strip() == self.expected


def read_questions(source: str) -> list[dict]:
    """Rows with `question` and `answer`: the sample's held-out split (`sample`) or a JSON-lines file."""
    if source == "sample":
        from data_pipeline.sources.sample import held_out_rows

        return held_out_rows()
    try:
        lines = Path(source).read_text().splitlines()
    except OSError as error:
        raise ConfigurationError(f"cannot read the questions in {source}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({"question": row["question"], "answer": row["answer"]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f'line {number} of {source} is not an object with "question" and "answer"'
            ) from error
    return rows


def evaluate(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[Answered]:
    """Answer every row's question greedily, next to the row's own answer, cleaned as the training text was."""
    given = answer(model, tokenizer, [row["question"] for row in rows], max_new_tokens, progress=progress)
    return [Answered(row["question"], clean_text(row["answer"]), text) for row, text in zip(rows, given, strict=True)]

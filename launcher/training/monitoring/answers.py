"""A few held-out questions answered during training, for a person to read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data_pipeline.loading.reader import RowReader
from data_pipeline.shards.packing import SPAN_COLUMNS
from data_pipeline.tokens.tokenization import decode_answer

LONGEST = 48  # tokens of an answer
START, ANSWER_START, END, OFFSET = (SPAN_COLUMNS.index(name) for name in ("start", "answer_start", "end", "offset"))


@dataclass(frozen=True)
class Question:
    """A held-out question as the model reads it, with its separator, and the text of both."""

    prompt: list[int]
    question: str
    expected: str


@dataclass(frozen=True)
class SampledAnswer:
    """A question, the answer that it should get and the one it got."""

    question: str
    expected: str
    given: str


def choose_questions(data: RowReader, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Question]:
    """The first document with its own question of `count` rows spread over the folder; the same on every rank."""
    chosen = []
    for row in np.unique(np.linspace(0, data.num_rows - 1, count).round().astype(np.int64)) if count else ():
        read = data.gather(np.array([row]))
        for span in read.spans:
            start, answer, end = (int(span[column]) for column in (START, ANSWER_START, END))
            if span[OFFSET] == 0 and start < answer < end:
                tokens = read.tokens[0].tolist()
                question, expected = (
                    decode_answer(tokenizer, tokens[a:b]) for a, b in ((start, answer), (answer, end))
                )
                chosen.append(Question(tokens[start:answer], question, expected))
                break
    return chosen


@torch.no_grad()
def sample_answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> list[SampledAnswer]:
    """Answer greedily, all ranks the same questions together.

    Each token is a forward in which all ranks take part, since ZeRO-3 gathers weights and experts exchange tokens in it:
    a rank that has its answers goes on until all have theirs (`synced_gpus`).
    """
    if not questions:
        return []
    width = max(len(question.prompt) for question in questions)
    room = max(1, min(LONGEST, model.config.max_position_embeddings - width))
    ids = torch.full((len(questions), width), tokenizer.pad_token_id)
    for row, question in enumerate(questions):
        ids[row, width - len(question.prompt) :] = torch.tensor(question.prompt)
    lengths = torch.tensor([[len(question.prompt)] for question in questions])
    mask = (torch.arange(width) >= width - lengths).long()
    device = next(model.buffers()).device
    output = model.generate(
        ids.to(device), attention_mask=mask.to(device), max_new_tokens=room, do_sample=False, synced_gpus=True
    )
    return [
        SampledAnswer(question.question, question.expected, decode_answer(tokenizer, row))
        for question, row in zip(questions, output[:, width:].tolist(), strict=True)
    ]


def answers_as_text(answers: list[SampledAnswer]) -> str:
    """The answers as a Markdown table."""

    def cell(text: str) -> str:
        return " ".join(text.replace("|", "&#124;").split())

    rows = [f"| {cell(a.question)} | {cell(a.expected)} | {cell(a.given)} |" for a in answers]
    return "\n".join(["| question | expected | given |", "|---|---|---|", *rows])

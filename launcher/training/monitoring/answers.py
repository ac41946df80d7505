"""Answers of the model to a few held-out questions, shown during training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from data_pipeline.loading.row_reader import RowReader
from data_pipeline.tokens.tokenization import decode_answer
from launcher.held_out_questions import Question, questions_in, spread
from model import LiquidForCausalLM

LONGEST = 48  # tokens; longer answers are cut off


@dataclass(frozen=True)
class SampledAnswer:
    """A question, its expected answer and the model's answer."""

    question: str
    expected: str
    given: str


def choose_questions(data: RowReader, tokenizer: PreTrainedTokenizerFast, count: int) -> list[Question]:
    """Choose up to `count` questions from rows spread evenly over the folder; the same on every rank.

    Each row gives its first document that lies whole in it.
    """
    found = (next(questions_in(data, row, tokenizer), None) for row in spread(data.num_rows, count))
    return [question for question in found if question is not None]


@torch.no_grad()
def sample_answers(
    model: LiquidForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]
) -> list[SampledAnswer]:
    """Answer the questions with greedy decoding; called by all ranks with the same questions.

    ZeRO-3 and expert parallelism communicate in every forward. So a rank that has finished its answers keeps running
    forwards until all ranks have finished (`synced_gpus`).
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
    """Format the answers as a Markdown table."""

    def cell(text: str) -> str:
        return " ".join(text.replace("|", "&#124;").split())

    rows = [f"| {cell(a.question)} | {cell(a.expected)} | {cell(a.given)} |" for a in answers]
    return "\n".join(["| question | expected | given |", "|---|---|---|", *rows])

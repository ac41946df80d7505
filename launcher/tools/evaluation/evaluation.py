"""Evaluate a model with teacher-forced metrics and generated answers.

Every process holds the whole model. The batches are the same for any number of processes and are dealt out round-robin.
Rank 0 gathers the results in batch order and sums them alone, so the metrics do not depend on the number of processes,
to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from textwrap import shorten

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from launcher.environment import Environment
from launcher.held_out_questions import Question
from launcher.tools.evaluation.held_out import HeldOut
from launcher.tools.evaluation.likelihood import bytes_of_tokens, likelihood_metrics, score_rows
from launcher.tools.evaluation.text_metrics import is_exact, rouge, text_metrics
from launcher.tools.inference.generation import Decoding, answer_prompts, batches_of_like_length, check_room
from launcher.training.resilience.leaving import leave_together
from model import LiquidForCausalLM

# How long rank 0 waits for the slowest process. A failed process is noticed at once.
LONGEST_WAIT = timedelta(days=1)
# Logits of one forward pass: a quarter of a gigabyte in fp32.
LOGITS_AT_ONCE = 2**26

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Answered:
    """A held-out question with its expected and its generated answer; `rouge_l` compares the two."""

    question: str
    expected: str
    given: str
    rouge_l: float

    @property
    def is_right(self) -> bool:
        return is_exact(self.given, self.expected)


@dataclass(frozen=True)
class Evaluation:
    """The result: `likelihood` and `text` metrics by name, and every answer in the order of the questions.

    counts: the rows, documents and tokens behind the likelihood metrics, and the answers behind the text metrics.
    """

    likelihood: dict[str, float | None]
    text: dict[str, float | None]
    counts: dict[str, int]
    answers: list[Answered]


class Ranks:
    """The processes of one evaluation."""

    def __init__(self, environment: Environment):
        """Join the process group. It uses gloo on every device, since only plain Python values are sent."""
        self.rank, self.size = environment.rank, environment.world_size
        if self.size > 1:
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)

    def share(self, items: list) -> list:
        """Return this process's items: every `size`-th."""
        return items[self.rank :: self.size]

    def gather(self, found: list) -> list | None:
        """Return the results of all processes in the order of the items on rank 0, and None on the other ranks."""
        if self.size == 1:
            return found
        everyone: list | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(found, everyone)
        if everyone is None:
            return None
        return [everyone[turn % self.size][turn // self.size] for turn in range(sum(map(len, everyone)))]

    def part(self) -> None:
        """Leave together, so that the first process to exit is not mistaken for a failed one."""
        if self.size > 1:
            leave_together()


def evaluate(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: HeldOut,
    decoding: Decoding,
    ranks: Ranks,
    batch_size: int,
    max_answers: int | None,
    progress: Callable[[str, int], Progress],
) -> Evaluation | None:
    """Score every row and answer the first `max_answers` questions; return None except on rank 0.

    batch_size: rows and questions per forward pass; a different value may change the last digits of the metrics.
    progress: `progress(what, total)` starts a progress bar and returns a function that takes the number of newly
    finished items.
    Raises `ConfigurationError` if a question fills the model's positions and leaves none for its answer.
    """
    questions = held_out.questions[:max_answers]
    for question in questions:
        check_room(model, question.prompt, 1, f"the question {shorten(question.question, 80)!r}")
    scores = _score(model, tokenizer, held_out, ranks, batch_size, progress)
    given = _answer(model, tokenizer, questions, decoding, ranks, batch_size, progress)
    if scores is None or given is None:
        return None
    documents = list(chain.from_iterable(scores))
    expected = [question.expected for question in questions]
    scored = rouge(given, expected)
    return Evaluation(
        likelihood=likelihood_metrics(documents) if documents else {},
        text=text_metrics(given, expected, scored) if given else {},
        counts={
            "rows": len(held_out.numbers),
            "documents": len(documents),
            "whole_documents": sum(document.is_whole for document in documents),
            "answer_tokens": sum(document.tokens for document in documents),
            "answers": len(given),
        },
        answers=[
            Answered(question.question, question.expected, text, score["rouge_l"])
            for question, text, score in zip(questions, given, scored, strict=True)
        ],
    )


def _score(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: HeldOut,
    ranks: Ranks,
    batch_size: int,
    progress: Callable[[str, int], Progress],
) -> list | None:
    """Score the documents of each row; the result is in the order of the rows."""
    rows, numbers = held_out.rows, held_out.numbers
    seq_len = rows.gather(numbers[:1]).tokens.shape[1]
    size = max(1, min(batch_size, LOGITS_AT_ONCE // (seq_len * model.config.vocab_size)))
    bytes_of = bytes_of_tokens(tokenizer, model.config.vocab_size)
    batches = ranks.share([numbers[begin : begin + size] for begin in range(0, len(numbers), size)])
    advance = progress("rows scored", sum(map(len, batches)))
    found = []
    for batch in batches:
        found.append(score_rows(model, rows.gather(batch), rows.pad_token_id, bytes_of))
        advance(len(batch))
    return _joined(ranks.gather(found))


def _answer(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    decoding: Decoding,
    ranks: Ranks,
    batch_size: int,
    progress: Callable[[str, int], Progress],
) -> list[str] | None:
    """Answer the questions; the result is in the order of the questions."""
    prompts = [question.prompt for question in questions]
    batches = batches_of_like_length(prompts, batch_size)
    mine = ranks.share(batches)
    advance = progress("questions answered", sum(map(len, mine)))
    found = []
    for batch in mine:
        chosen = [prompts[index] for index in batch]
        found.append(answer_prompts(model, tokenizer, chosen, decoding.within(model, max(map(len, chosen)))))
        advance(len(batch))
    texts = _joined(ranks.gather(found))
    if texts is None:
        return None
    by_question = dict(zip(chain.from_iterable(batches), texts, strict=True))
    return [by_question[index] for index in range(len(questions))]


def _joined(batches: Iterable[list] | None) -> list | None:
    return None if batches is None else list(chain.from_iterable(batches))


def by_quality(answers: list[Answered]) -> list[Answered]:
    """Sort the answers, best first: exact matches, then by ROUGE-L. The sort is stable."""
    return sorted(answers, key=lambda answered: (not answered.is_right, -answered.rouge_l))

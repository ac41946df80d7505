"""One evaluation: teacher-forced figures and generated answers, by any number of processes with the same result.

Every process holds the whole model. Batches are cut alike whatever their number and dealt out in turn; what was found is
gathered in the batches' order and added up by the first process alone, so that the figures are the same to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from textwrap import shorten

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from launcher.environment import Environment
from launcher.tools.evaluation.held_out import HeldOut, Question
from launcher.tools.evaluation.likelihood import bytes_of_tokens, likelihood_metrics, score_rows
from launcher.tools.evaluation.text_metrics import is_exact, rouge, text_metrics
from launcher.tools.inference.generation import Decoding, answer_prompts, batches_of_like_length, check_room
from launcher.training.resilience.leaving import leave_together
from model import LiquidForCausalLM

LONGEST_WAIT = timedelta(days=1)  # for the slowest process; one that failed is noticed at once
LOGITS_AT_ONCE = 2**26  # of one forward: a quarter of a gigabyte in fp32

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Answered:
    """One held-out question, the answer it should get and the one it got; `rouge_l` says how near it is."""

    question: str
    expected: str
    given: str
    rouge_l: float

    @property
    def is_right(self) -> bool:
        return is_exact(self.given, self.expected)


@dataclass(frozen=True)
class Evaluation:
    """What was found: `likelihood` and `text` figures by name, and every answer in the questions' order.

    counts: rows, documents and tokens behind the likelihood figures, and answers behind the others.
    """

    likelihood: dict[str, float | None]
    text: dict[str, float | None]
    counts: dict[str, int]
    answers: list[Answered]


class Team:
    """The processes of one evaluation."""

    def __init__(self, environment: Environment):
        """Meet the others, over gloo whatever the device is: only results in Python's own numbers are sent."""
        self.rank, self.size = environment.rank, environment.world_size
        if self.size > 1:
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)

    def share(self, items: list) -> list:
        """This process's items: every `size`-th."""
        return items[self.rank :: self.size]

    def gather(self, found: list) -> list | None:
        """What all found for their shares, in the items' order, for the first process; None for the others."""
        if self.size == 1:
            return found
        everyone = [None] * self.size if self.rank == 0 else None
        dist.gather_object(found, everyone)
        if everyone is None:
            return None
        return [everyone[turn % self.size][turn // self.size] for turn in range(sum(map(len, everyone)))]

    def part(self) -> None:
        """Leave together, so that nobody takes the end of one for a failure."""
        if self.size > 1:
            leave_together()


def evaluate(
    model: LiquidForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    decoding: Decoding,
    team: Team,
    batch_size: int,
    max_answers: int | None,
    progress: Callable[[str, int], Progress],
) -> Evaluation | None:
    """Score every row and answer the questions (at most `max_answers`, the first); None but for the first process.

    `batch_size`: rows and questions at once; figures of another one may differ in the last digits.
    `progress(what, total)` begins a bar, and what it gives is told how many more are done.
    Raises `ConfigurationError` for a question without room for its answer.
    """
    questions = held_out.questions[:max_answers]
    for question in questions:
        check_room(model, question.prompt, 1, f"the question {shorten(question.question, 80)!r}")
    scores = _score(model, tokenizer, held_out, team, batch_size, progress)
    given = _answer(model, tokenizer, questions, decoding, team, batch_size, progress)
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


def _score(model, tokenizer, held_out: HeldOut, team: Team, batch_size: int, progress) -> list | None:
    """The scores of each row's documents, in the rows' order."""
    rows, numbers = held_out.rows, held_out.numbers
    seq_len = rows.gather(numbers[:1]).tokens.shape[1]
    size = max(1, min(batch_size, LOGITS_AT_ONCE // (seq_len * model.config.vocab_size)))
    bytes_of = bytes_of_tokens(tokenizer, model.config.vocab_size)
    batches = team.share([numbers[begin : begin + size] for begin in range(0, len(numbers), size)])
    advance = progress("rows scored", sum(map(len, batches)))
    found = []
    for batch in batches:
        found.append(score_rows(model, rows.gather(batch), rows.pad_token_id, bytes_of))
        advance(len(batch))
    return _joined(team.gather(found))


def _answer(
    model, tokenizer, questions: list[Question], decoding: Decoding, team: Team, batch_size: int, progress
) -> list[str] | None:
    """The answers, in the questions' order."""
    prompts = [question.prompt for question in questions]
    batches = batches_of_like_length(prompts, batch_size)
    mine = team.share(batches)
    advance = progress("questions answered", sum(map(len, mine)))
    found = []
    for batch in mine:
        chosen = [prompts[index] for index in batch]
        found.append(answer_prompts(model, tokenizer, chosen, decoding.within(model, max(map(len, chosen)))))
        advance(len(batch))
    texts = _joined(team.gather(found))
    if texts is None:
        return None
    by_question = dict(zip(chain.from_iterable(batches), texts, strict=True))
    return [by_question[index] for index in range(len(questions))]


def _joined(batches: Iterable[list] | None) -> list | None:
    return None if batches is None else list(chain.from_iterable(batches))


def by_quality(answers: list[Answered]) -> list[Answered]:
    """The best first: exactly right ones, then those with the highest ROUGE-L; equally good ones stay in their order."""
    return sorted(answers, key=lambda answered: (not answered.is_right, -answered.rouge_l))

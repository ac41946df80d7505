"""Validation during training: each held-out row is scored once, for any number of ranks.

Legend: B rows, T tokens, V vocabulary, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import ValidationBatches
from data_pipeline.loading.mixture import open_data
from data_pipeline.loading.row_reader import RowReader
from launcher.config import RunConfig
from launcher.errors import ConfigurationError
from launcher.training.monitoring.answers import SampledAnswer, choose_questions, sample_answers
from launcher.training.monitoring.reading import read_together
from launcher.training.monitoring.reduction import add_up
from launcher.training.setup.data_source import held_out_location, shard_cache

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TOP = 5
# Most logits of one forward, about half a gigabyte in 16 bits. The model returns them all at once.
LOGITS_AT_ONCE = 2**28
CHUNK_TOKENS = 512  # tokens whose logits are converted to fp32 at a time


@dataclass(frozen=True)
class ValidationResult:
    """Results on the held-out rows, the same on every rank.

    cross_entropy: mean over supervised tokens, in nats.
    token_accuracy, top5_accuracy: shares of supervised tokens that are the likeliest, or among the five likeliest.
    sequence_accuracy: share of the documents in `sequences` in which each token of the answer is the likeliest, given the
        correct tokens before it; None if there are no such documents.
    sequences: number of documents that lie whole in a row and have an answer.
    by_source: cross entropy and number of supervised tokens of each source that has any, the largest source first.
    """

    cross_entropy: float
    token_accuracy: float
    top5_accuracy: float
    sequence_accuracy: float | None
    supervised_tokens: int
    sequences: int
    by_source: dict[str, tuple[float, int]]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.cross_entropy, 700.0))  # a larger exponent overflows


def open_validation_data(config: RunConfig, data: RowReader) -> RowReader | None:
    """Open `validation_data`, or the folder `validation` in `data`; None if there is neither, or validation is off.

    Raises `ConfigurationError` if the rows have another tokenizer than `data` or are longer, and `DataError` if they
    cannot be read.
    """
    if config.validate_every == 0:
        return None
    location = held_out_location(config.data, config.validation_data)
    if location is None:
        return None
    held_out = open_data(location, config.on_bad_shard, shard_cache(config.data_cache))
    if held_out.tokenizer_fingerprint != data.tokenizer_fingerprint or held_out.seq_len > data.seq_len:
        raise ConfigurationError(
            f"validation_data {held_out.location} has another tokenizer or longer rows than {data.location}; prepare it "
            f"with --tokenizer {data.tokenizer_path} --seq-len {data.seq_len}"
        )
    return held_out if held_out.num_rows else None


class Validation:
    """Score this rank's share of a run's held-out rows when a validation is due."""

    def __init__(self, config: RunConfig, data: RowReader | None, rank: int, world_size: int):
        """Prepare the validation; without `data` it is never due.

        `of` identifies the rows and labels: only validations with the same `of` are comparable.
        """
        self.data = data
        self.every = config.validate_every or config.checkpoint_every
        self.last_step = config.max_steps
        self.of = "" if data is None else f"{config.loss_on} of {data.fingerprint}"
        if data is not None:
            # The batch size limits memory only; results do not depend on it or on the number of ranks.
            rows = max(1, min(config.micro_batch_rows, LOGITS_AT_ONCE // (data.seq_len * data.vocab_size)))
            self._batches, self._answers = (
                ValidationBatches(data, micro_batch_rows=rows, rank=rank, world_size=world_size, loss_on=loss_on)
                for loss_on in (config.loss_on, "answer")
            )
            self._tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(data.tokenizer_path))
            self._questions = choose_questions(data, self._tokenizer, config.validation_samples)

    def is_due(self, step: int) -> bool:
        return self.data is not None and (step % self.every == 0 or step == self.last_step)

    def run(
        self, engine: DeepSpeedEngine, interrupted: Callable[[], bool]
    ) -> tuple[ValidationResult, list[SampledAnswer]] | None:
        """Score every held-out row once and answer a few questions.

        All ranks must call this, and all run the same number of forward passes.

        interrupted: called before each batch. It must return the same on all ranks; if it returns True, the result is None.
        Raises `DataError` on all ranks if any rank cannot read its rows, or if there are no supervised tokens.
        """
        if self.data is None:
            raise ValueError("there are no held-out rows to validate on")
        config = engine.module.config
        sums: dict[str, torch.Tensor] = {}
        batches = zip(self._batches, self._answers, strict=True)
        with evaluating(engine):
            for (inputs, sources), (of_answers, _) in read_together(batches, engine.device):
                if interrupted():
                    return None
                ids, labels, positions, asked, sources = (
                    tensor.to(engine.device) for tensor in (*inputs.values(), of_answers["labels"], sources)
                )
                logits = engine(input_ids=ids, position_ids=positions, use_cache=False).logits
                loss, place = score_tokens(logits[:, :-1], ids[:, 1:])
                del logits
                part = _token_sums(loss, place, labels[:, 1:], sources[:, 1:], len(self.data.sources))
                part |= _sequence_sums(place == 0, ids, asked, positions, config.bos_token_id, config.eos_token_id)
                sums = {name: sums.get(name, 0.0) + value.double() for name, value in part.items()}
            if interrupted():
                return None
            answers = sample_answers(engine.module, self._tokenizer, self._questions)
        return _result(self.data, add_up([sums])), answers


def _result(data: RowReader, totals: dict[str, torch.Tensor]) -> ValidationResult:
    tokens, sequences = int(totals["tokens"]), int(totals["sequences"])
    if tokens == 0:
        raise DataError(f"{data.location} has no supervised token in its readable rows; set validate_every=0")
    of_sources = zip(data.sources, totals["source_loss"].tolist(), totals["source_tokens"].tolist(), strict=True)
    by_source = {name: (loss / count, int(count)) for name, loss, count in of_sources if count}
    return ValidationResult(
        cross_entropy=totals["cross_entropy"].item() / tokens,
        token_accuracy=totals["correct"].item() / tokens,
        top5_accuracy=totals["among_top"].item() / tokens,
        sequence_accuracy=totals["right_sequences"].item() / sequences if sequences else None,
        supervised_tokens=tokens,
        sequences=sequences,
        by_source=dict(sorted(by_source.items(), key=lambda item: -item[1][1])),
    )


@contextmanager
def evaluating(engine: DeepSpeedEngine) -> Iterator[None]:
    """Switch the engine to evaluation without gradients, and afterwards restore training and the values of all buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in engine.module.buffers()]
    engine.eval()
    try:
        # Not inference mode: ZeRO-3 may keep weights that it gathers here, and training cannot use inference tensors.
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:  # among them AutoEP's counts of tokens per expert
                buffer.copy_(before)
        engine.train()


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p of each target (fp32) and its rank among all tokens by likelihood, from 0; both `[B, T]`.

    `logits` `[B, T, V]`, `targets` `[B, T]`. Of equally likely tokens, the one with the lower id ranks first.
    """
    losses, places = [], []
    ids = torch.arange(logits.shape[-1], device=logits.device)
    for part, target in zip(
        logits.flatten(0, 1).split(CHUNK_TOKENS), targets.flatten().split(CHUNK_TOKENS), strict=True
    ):
        wide, target = part.float(), target.unsqueeze(1)
        own = wide.gather(1, target)
        losses.append(wide.logsumexp(1) - own.squeeze(1))
        places.append(((wide > own) | ((wide == own) & (ids < target))).sum(1))
    return torch.cat(losses).view(targets.shape), torch.cat(places).view(targets.shape)


def _token_sums(
    loss: torch.Tensor, place: torch.Tensor, labels: torch.Tensor, sources: torch.Tensor, num_sources: int
) -> dict[str, torch.Tensor]:
    """Sum up the figures of the supervised tokens, in fp64; tensors are `[B, T - 1]`, of the predicted tokens."""
    asked = labels != -100
    loss, place, sources = loss[asked].double(), place[asked], sources[asked]
    none = loss.new_zeros(num_sources)
    return {
        "cross_entropy": loss.sum(),
        "tokens": asked.sum(),
        "correct": (place == 0).sum(),
        "among_top": (place < TOP).sum(),
        "source_loss": none.index_add(0, sources, loss),
        "source_tokens": none.index_add(0, sources, torch.ones_like(loss)),
    }


def _sequence_sums(
    correct: torch.Tensor, ids: torch.Tensor, answers: torch.Tensor, positions: torch.Tensor, begin: int, end: int
) -> dict[str, torch.Tensor]:
    """Count the documents with an answer that lie whole in a row, and those of them whose answer is right.

    `correct` `[B, T - 1]`: for each row's tokens after the first. `answers` `[B, T]`: labels of the answers only.
    """
    document = (positions.flatten() == 0).cumsum(0) - 1
    starts = (positions.flatten() == 0).nonzero().squeeze(1)
    ends = torch.cat((starts[1:], starts.new_tensor([ids.numel()]))) - 1
    is_whole = (ids.flatten()[starts] == begin) & (ids.flatten()[ends] == end)  # False for a piece of a long document
    asked = (answers != -100).flatten()
    wrong = asked & ~torch.nn.functional.pad(correct, (1, 0)).flatten()
    nothing = torch.zeros_like(starts)
    counts = (nothing.index_add(0, document, flags.long()) for flags in (asked, wrong))
    has_answer, faults = (count > 0 for count in counts)
    is_whole &= has_answer
    return {"sequences": is_whole.sum(), "right_sequences": (is_whole & ~faults).sum()}

"""Teacher-forced metrics: each token of the expected answers is predicted from the correct tokens before it.

The answers' tokens and the closing `</s>` count, in every piece of a document. Questions, `<sep>` and padding are model
input but do not count. All metrics are sums over documents in row order, so they do not depend on which process scored
which row.

Legend: B rows, T tokens, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from data_pipeline.loading.collate import IGNORE_INDEX, Pieces, collate
from data_pipeline.shards.packing import PackedRows
from launcher.tools.evaluation.metric import Metric
from launcher.training.monitoring.validation import score_tokens
from model import LiquidForCausalLM

TOP = (1, 3, 5, 10)


@dataclass(frozen=True)
class DocumentScore:
    """One document (or a piece of one) in a row, with sums over its answer's tokens.

    nats: the sum of -log p. tokens, bytes: the length of the answer (`</s>` counts as a token without bytes).
    among_top: how many tokens were among the model's 1, 3, 5 and 10 most likely. is_whole: the row holds both the
    document's beginning and its end.
    """

    nats: float
    tokens: int
    bytes: int
    among_top: tuple[int, ...]
    is_whole: bool


@torch.inference_mode()
def score_rows(
    model: LiquidForCausalLM, rows: PackedRows, pad_token_id: int, bytes_of: np.ndarray
) -> list[list[DocumentScore]]:
    """Score the documents of each row that have at least one answer token.

    bytes_of: the number of bytes of each token's text, `[vocab]`.
    """
    collated = collate(rows, pad_token_id, "answer")
    ids, positions = (torch.from_numpy(array).to(model.device) for array in (collated[0], collated[2]))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    loss, place = score_tokens(logits[:, :-1], ids[:, 1:])
    # Align each prediction with the token that it predicts; nothing predicts a row's first token.
    nats = np.pad(loss.double().cpu().numpy(), ((0, 0), (1, 0))).reshape(-1)
    places = np.pad(place.cpu().numpy(), ((0, 0), (1, 0))).reshape(-1)
    ids, asked = collated[0].reshape(-1), collated[1].reshape(-1) != IGNORE_INDEX
    begin_id, end_id = model.config.bos_token_id, model.config.eos_token_id
    pieces, seq_len = Pieces(rows), rows.tokens.shape[1]
    scores: list[list[DocumentScore]] = [[] for _ in rows.tokens]
    for start, end in zip(pieces.starts.tolist(), pieces.ends.tolist(), strict=True):
        where = np.flatnonzero(asked[start:end]) + start
        if len(where):
            scores[start // seq_len].append(
                DocumentScore(
                    nats=math.fsum(nats[where]),
                    tokens=len(where),
                    bytes=int(bytes_of[ids[where]].sum()),
                    among_top=tuple(int((places[where] < top).sum()) for top in TOP),
                    is_whole=bool(ids[start] == begin_id and ids[end - 1] == end_id),
                )
            )
    return scores


@dataclass(frozen=True)
class Totals:
    """Sums over all documents. whole, right: documents that lie whole in a row, and those with every token right."""

    nats: float
    tokens: int
    bytes: int
    among_top: dict[int, int]
    whole: int
    right: int

    @classmethod
    def of(cls, scores: Sequence[DocumentScore]) -> Totals:
        whole = [score for score in scores if score.is_whole]
        return cls(
            nats=math.fsum(score.nats for score in scores),
            tokens=sum(score.tokens for score in scores),
            bytes=sum(score.bytes for score in scores),
            among_top={top: sum(score.among_top[place] for score in scores) for place, top in enumerate(TOP)},
            whole=len(whole),
            right=sum(score.among_top[0] == score.tokens for score in whole),
        )


def likelihood_metrics(scores: Sequence[DocumentScore]) -> dict[str, float | None]:
    """Return all of `LIKELIHOOD_METRICS` over all documents, by name."""
    totals = Totals.of(scores)
    return {name: metric.compute(totals) for name, metric in LIKELIHOOD_METRICS.items()}


def _accuracy(top: int) -> Callable[[Totals], float]:
    return lambda totals: totals.among_top[top] / totals.tokens


LIKELIHOOD_METRICS: dict[str, Metric[Totals]] = {
    "cross_entropy": Metric(
        "cross entropy, nats per token", "{:.4f}",
        "mean over the tokens of the expected answers and their closing `</s>`, each predicted from the correct tokens "
        "before it",
        lambda totals: totals.nats / totals.tokens,
    ),
    "perplexity": Metric(
        "perplexity per token", "{:.3f}", "exp of the cross entropy",
        lambda totals: math.exp(min(totals.nats / totals.tokens, 700.0)),  # exp overflows a float above about 709
    ),
    "bits_per_byte": Metric(
        "bits per byte", "{:.4f}", "the same nats, with those of `</s>`, in bits, divided by the bytes of the answers' text",
        lambda totals: totals.nats / math.log(2) / max(1, totals.bytes),
    ),
    "token_accuracy": Metric(
        "correct token is the most likely", "{:.2%}", "the share of those tokens that were the most likely", _accuracy(1)
    ),
    **{
        f"top{top}_accuracy": Metric(
            f"correct token is in the top {top}", "{:.2%}", f"the share of those tokens among the {top} most likely",
            _accuracy(top),
        )
        for top in TOP[1:]
    },
    "sequence_accuracy": Metric(
        "answers with every token correct", "{:.2%}",
        "the share of whole documents (not split between rows) in which every answer token was the most likely",
        lambda totals: totals.right / totals.whole if totals.whole else None, "no whole answer",
    ),
}  # fmt: skip


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> np.ndarray:
    """Return the number of bytes of text of each token id, int64 `[vocab_size]`; special tokens have 0.

    `lfm prepare` accepts only byte-level BPE, which spells each byte as one character.
    """
    special = set(tokenizer.all_special_ids)
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for text, index in tokenizer.get_vocab().items():
        if index not in special:
            lengths[index] = len(text)
    return lengths

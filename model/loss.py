"""The terms of the training loss, as sums over tokens, so that none depends on how a batch is split over ranks.

The trainer divides each term by N, the supervised tokens of the global batch, or by M, its non-padding tokens:

    cross_entropy   Σ -log p_t                                 / N
    focal           Σ (1 - p_t)^γ · -log p_t  (Lin et al. 2017) / N
    reconstruction  Σ ‖rms(y_t) - rms(e_t)‖² / D               / M   (model/embedding.py)
    budget          Σ (r̂ - r*)² + 2 (r̂ - r*)(ρ_t - r̂)           / M
    expert_usage    Σ Σ_e p_te log(E q_e)                      / M   (mean over layers)
    z_loss          Σ logsumexp(router logits_t)²              / M   (mean over layers; Zoph et al. 2022)

Budget and expert usage are functions of batch means: (mean ρ - r*)², and Σ_e p̄_e log(E p̄_e), which is zero if every
expert is used equally. A function of a mean is not a sum over tokens. Its first-order expansion around r̂ and q, the
means of earlier steps, is such a sum and has the same gradient there.

`PER_SUPERVISED_TOKEN` and `PER_TOKEN` hold a function for each term. A new term is an entry there, and a field of its name in
`LossWeights` and in the run's keys (`launcher/config.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024
# How many logits are widened to fp32 at a time: on a CPU as many as its cache holds, on a GPU enough to need few calls.
SLICE_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


@dataclass
class LossWeights:
    """The weights of the loss terms and the focal term's exponent γ; the cross entropy has weight 1."""

    focal: float = 0.1
    focal_gamma: float = 2.0
    reconstruction: float = 0.1
    budget: float = 0.1
    expert_usage: float = 0.01
    z_loss: float = 0.001


def weight_of(term: str, weights: object) -> float:
    """Return the weight of a term; `weights` may be any object with the fields of `LossWeights`."""
    return 1.0 if term == "cross_entropy" else getattr(weights, term)


@dataclass
class RunningMeans:
    """The means over earlier steps around which two terms are expanded: routing `[L, E]` and retained ratio `[]`."""

    routing: torch.Tensor
    retained_ratio: torch.Tensor

    @classmethod
    def initial(cls, layers: int, experts: int, target_ratio: float) -> RunningMeans:
        """Start from uniform routing and the target ratio: both terms then have no gradient."""
        return cls(torch.full((layers, experts), 1.0 / experts), torch.tensor(target_ratio))

    def updated(self, routing: torch.Tensor, retained_ratio: torch.Tensor, decay: float = 0.9) -> RunningMeans:
        """Return the means after one more step with these global batch means.

        Skip a non-finite batch (after an fp16 overflow, for example): the means would never become finite again.
        """
        if not (routing.isfinite().all() and retained_ratio.isfinite()):
            return self
        return RunningMeans(
            decay * self.routing + (1 - decay) * routing, decay * self.retained_ratio + (1 - decay) * retained_ratio
        )


def check_labels(labels: torch.Tensor, used_vocab_size: int) -> None:
    """Raise `ValueError` for labels that are neither -100 nor a token id.

    On a GPU, looking up such a label aborts the process. The check waits for the GPU. Before the model's first kernel this
    costs nothing, because the model waits there anyway to find the documents.
    """
    if ((labels != -100) & ((labels < 0) | (labels >= used_vocab_size))).any():
        raise ValueError(
            f"labels range from {int(labels.min())} to {int(labels.max())}; each must be -100 or a token id from 0 to "
            f"{used_vocab_size - 1} (after adding tokens, call model.resize_token_embeddings(len(tokenizer)))"
        )


def language_loss_sums(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    focal_gamma: float,
    chunk_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """Sum the cross entropy and focal loss over supervised tokens in fp32, never holding all logits at once.

    `hidden` `[B, T, D]`; `labels` `[B, T]` aligned with the inputs: position t predicts label t + 1, and -100 is not
    predicted; `head` `[n, D]` → logits `[n, V]`. Only one chunk of tokens has its logits in memory at a time; the
    backward pass recomputes them.

    The head is called exactly once per chunk, whatever the labels. Under ZeRO-3 each call gathers its weight, and ranks
    that made different numbers of calls would deadlock.
    """
    chunk_tokens = chunk_tokens or CHUNK_TOKENS
    states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    parts = [
        checkpoint(_chunk_sums, head, *chunk, focal_gamma, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(states.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    totals = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
    return dict(zip(PER_SUPERVISED_TOKEN, totals, strict=True))


def _chunk_sums(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor, focal_gamma: float
) -> tuple[torch.Tensor, ...]:
    asked = targets != -100
    negative_log_likelihood = NegativeLogLikelihood.apply(head(states[asked]), targets[asked])
    return tuple(term(negative_log_likelihood, focal_gamma) for term in PER_SUPERVISED_TOKEN.values())


def _cross_entropy(negative_log_likelihood: torch.Tensor, focal_gamma: float) -> torch.Tensor:
    return negative_log_likelihood.sum()


def _focal(negative_log_likelihood: torch.Tensor, focal_gamma: float) -> torch.Tensor:
    # expm1 keeps (1 - p) exact if p is nearly 1. The clamp is needed because at 0 a power below 1 has no finite gradient.
    missing = (-torch.expm1(-negative_log_likelihood)).clamp(min=torch.finfo(torch.float32).eps)
    return (missing**focal_gamma * negative_log_likelihood).sum()


# Functions of -log p of each supervised token, fp32 `[n]`, and γ.
PER_SUPERVISED_TOKEN = {"cross_entropy": _cross_entropy, "focal": _focal}


class NegativeLogLikelihood(torch.autograd.Function):
    """Compute -log p of each target in fp32, from `[n, V]` logits and `[n]` targets, without an fp32 copy of the logits.

    torch's cross-entropy kernels pass over an fp32 copy of all logits several times. Here each slice is widened, used
    and dropped while it is in the cache, and the gradient (softmax - onehot) is written in the logits' dtype.
    """

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = max(1, SLICE_ELEMENTS.get(logits.device.type, 2**26) // logits.shape[1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        normaliser = torch.cat([part.to(wide).logsumexp(1) for part in logits.split(rows)])
        context.save_for_backward(logits, targets, normaliser)
        context.rows = rows
        return normaliser - logits.gather(1, targets.unsqueeze(1)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normaliser = context.saved_tensors
        result = torch.empty_like(logits)
        tensors = (logits, targets.unsqueeze(1), normaliser.unsqueeze(1), gradient.unsqueeze(1), result)
        for part, target, total, weight, out in zip(*(x.split(context.rows) for x in tensors), strict=True):
            surplus = (part.to(total.dtype) - total).exp_()
            surplus.scatter_add_(1, target, surplus.new_full((1, 1), -1.0).expand_as(target))
            out.copy_(surplus.mul_(weight))
        return result, None


@dataclass(frozen=True)
class TokenFigures:
    """What the model computed for the M non-padding tokens of a batch, and what the terms compare it with.

    `router_logits` `[L, M, E]` in fp32, `reconstruction_error` and `retained_ratio` `[M]`.
    """

    router_logits: torch.Tensor
    reconstruction_error: torch.Tensor
    retained_ratio: torch.Tensor
    means: RunningMeans
    target_ratio: float


def regularisation_sums(
    router_logits: torch.Tensor,
    reconstruction_error: torch.Tensor,
    retained_ratio: torch.Tensor,
    text: torch.Tensor,
    means: RunningMeans,
    target_ratio: float,
) -> dict[str, torch.Tensor]:
    """Sum the terms over non-padding tokens in fp32.

    `router_logits` `[L, B, T, E]`, `reconstruction_error` and `retained_ratio` `[B, T]`, `text` bool `[B, T]`.
    """
    figures = TokenFigures(
        router_logits[:, text].float(), reconstruction_error[text], retained_ratio[text], means, target_ratio
    )
    return {name: term(figures) for name, term in PER_TOKEN.items()}


def _reconstruction(figures: TokenFigures) -> torch.Tensor:
    return figures.reconstruction_error.sum()


def _budget(figures: TokenFigures) -> torch.Tensor:
    mean = figures.means.retained_ratio.to(figures.retained_ratio)
    excess = mean - figures.target_ratio
    return (excess**2 + 2 * excess * (figures.retained_ratio - mean)).sum()


def _expert_usage(figures: TokenFigures) -> torch.Tensor:
    logits = figures.router_logits
    used = figures.means.routing.to(logits).clamp(
        min=torch.finfo(torch.float32).tiny
    )  # an expert may never have been used
    surplus = torch.log(used * logits.shape[-1]).unsqueeze(1)
    return (logits.softmax(-1) * surplus).sum() / len(logits)


def _z_loss(figures: TokenFigures) -> torch.Tensor:
    logits = figures.router_logits
    return logits.logsumexp(-1).square().sum() / len(logits)


PER_TOKEN = {"reconstruction": _reconstruction, "budget": _budget, "expert_usage": _expert_usage, "z_loss": _z_loss}


def total_loss(
    sums: dict[str, torch.Tensor], weights: object, supervised: torch.Tensor | float, tokens: torch.Tensor | float
) -> torch.Tensor:
    """Return Σ weight · sum / count, with the batch's N `supervised` tokens and M non-padding `tokens` as counts.

    `weights` may be any object with the fields of `LossWeights`.
    """
    return _weighted(PER_SUPERVISED_TOKEN, sums, weights) / supervised + _weighted(PER_TOKEN, sums, weights) / tokens


def _weighted(terms: Iterable[str], sums: dict[str, torch.Tensor], weights: object) -> torch.Tensor:
    return functools.reduce(torch.add, (weight_of(term, weights) * sums[term] for term in terms))

"""Mixture of experts: a softmax top-k router, SwiGLU experts in 3-D tensors, and a shared expert that sees every token.

DeepSpeed's AutoEP recognises this layout: router.gate.weight `[E, D]`, router.e_score_correction_bias `[E]`,
experts.gate_up_proj `[E, 2I, D]`, experts.down_proj `[E, D, I]`, shared_experts. It replaces this block with a layer that
spreads the experts over ranks and returns hidden states only, so this block does the same. The loss gets its logits from
`router_logits`, which reads the gate. That function and those for the balancing bias work on both kinds of block.

A bias on the choice of experts balances their load (Wang et al. 2024, auxiliary-loss-free load balancing). It is not a
parameter and does not affect the experts' weights; the trainer moves it against each step's load.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

from model.configuration import LiquidConfig
from model.projection import ResidualProjection


class Router(nn.Module):
    """Scores every expert for every token and keeps the best `num_experts_per_tok`."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        # AutoEP finds and copies the buffer by this name.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    @property
    def weight(self) -> torch.Tensor:
        """The gate's weight, under the name that AutoEP expects."""
        return self.gate.weight

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route `[T, D]` tokens → the chosen experts' indices and their normalised fp32 weights, both `[T, top_k]`.

        The bias affects only the choice; the weights are the probabilities without it.
        """
        probabilities = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        experts = choose_experts(probabilities, self.e_score_correction_bias, self.top_k)
        weights = probabilities.gather(-1, experts)
        # The bias can choose experts whose probabilities are all 0 in fp32. AutoEP adds the same constant.
        return experts, weights / (weights.sum(-1, keepdim=True) + 1e-20)

    def _apply(self, *arguments: Any, **options: Any) -> Router:
        """Keep the bias in fp32 when the module is cast: rounding would make close biases equal and change the choice."""
        exact = self.e_score_correction_bias
        super()._apply(*arguments, **options)
        if self.e_score_correction_bias.dtype != exact.dtype:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self


@use_experts_implementation
class GroupedExperts(nn.Module):
    """E SwiGLU feed-forwards, each applied to the tokens that chose it.

    transformers' `experts_implementation` selects the computation: its own `grouped_mm` (the default) or `batched_mm`,
    which read `num_experts` and `act_fn`, or `eager`, the forward below. Under AutoEP none of them runs.
    """

    def __init__(self, config: LiquidConfig):
        super().__init__()
        size = config.moe_intermediate_size
        self.num_experts = config.num_experts
        self.act_fn = F.silu
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, size))

    def forward(self, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum the weighted outputs: `tokens` `[T, D]`, `experts` and `weights` `[T, top_k]` → `[T, D]`."""
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=self.num_experts).tolist()
        outputs = [
            swiglu(part, gate_up, down)
            for part, gate_up, down in zip(
                tokens[order // top_k].split(counts), self.gate_up_proj, self.down_proj, strict=True
            )
        ]
        # Undo the sort, then weight and add in fp32, as AutoEP does.
        chosen = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, top_k))
        return (chosen * weights.unsqueeze(-1)).sum(1).to(tokens.dtype)


class Experts(GroupedExperts):
    """`GroupedExperts` that skips the sorting when a CPU decodes a single text, where it took half of the time."""

    def forward(self, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 1 or tokens.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(tokens, experts, weights)
        chosen = [swiglu(tokens, self.gate_up_proj[expert], self.down_proj[expert]) for expert in experts[0].tolist()]
        return (torch.cat(chosen) * weights.T).sum(0, keepdim=True).to(tokens.dtype)


class SharedExpert(nn.Module):
    """One SwiGLU feed-forward that is applied to every token."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        size = config.shared_expert_intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=False)
        self.down_proj = ResidualProjection(size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared one: `[B, T, D]` → `[B, T, D]`."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        routed = self.experts(tokens, *self.router(tokens))
        return routed.view_as(hidden) + self.shared_experts(hidden)


def swiglu(tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Apply one expert (Shazeer 2020): `tokens` `[n, D]`, `gate_up` `[2I, D]`, `down` `[D, I]` → `[n, D]`."""
    gate, up = F.linear(tokens, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def router_logits(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute the gate's logits `[B, T, E]`, for this block or for the AutoEP layer that replaced it.

    The gate is small (E columns), so evaluating it again is cheap. Returning its logits from a block whose forward may
    have been replaced is harder. Evaluating it again is also correct under every kind of activation checkpointing.
    """
    return block.router.gate(hidden)


def choose_experts(probabilities: torch.Tensor, bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """Choose the experts with the largest biased scores: `probabilities` and `bias` `[..., E]` → `[..., top_k]`.

    The result is unsorted, as in AutoEP, so that both break ties in the same way.
    """
    return (probabilities + bias).topk(top_k, dim=-1, sorted=False).indices


def balancing_bias(model: PreTrainedModel) -> torch.Tensor:
    """Stack the balancing biases of the model's routers, `[L, E]`."""
    return torch.stack([layer.moe.router.e_score_correction_bias for layer in model.model.layers])


@torch.no_grad()
def set_balancing_bias(model: PreTrainedModel, bias: torch.Tensor) -> None:
    """Copy `bias` `[L, E]` into the model's routers, on any device and in any dtype."""
    for layer, row in zip(model.model.layers, bias, strict=True):
        layer.moe.router.e_score_correction_bias.copy_(row)


def updated_balancing_bias(bias: torch.Tensor, load: torch.Tensor, rate: float) -> torch.Tensor:
    """Return the bias `[L, E]` after a step in which experts were chosen `load` `[L, E]` times (Wang et al. 2024, alg. 1).

    An expert below the mean load gains `rate`, one above it loses `rate`. Each layer's mean change, which does not affect
    the choice, is then subtracted, so the bias keeps its initial sum of zero. With no load or a rate of 0, the bias does
    not change.
    """
    direction = (load.mean(-1, keepdim=True) - load).sign().to(bias)
    return bias + rate * (direction - direction.mean(-1, keepdim=True))

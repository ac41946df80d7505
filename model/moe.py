"""Mixture of experts: a softmax top-k router, SwiGLU experts in 3-D tensors, and a shared expert that sees every token.

The layout (router.gate.weight `[E, D]`, experts.gate_up_proj `[E, 2I, D]`, experts.down_proj `[E, D, I]`,
shared_experts) is what DeepSpeed's AutoEP recognises; it replaces this block's forward by one that spreads the experts
over ranks. So the block returns hidden states only: what the loss needs is read from the gate by `router_logits`,
which works on either kind of block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.configuration import LiquidConfig
from model.projection import ResidualProjection


class Router(nn.Module):
    """Scores every expert for every token and keeps the best `num_experts_per_tok`."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    @property
    def weight(self) -> nn.Parameter:
        """The gate's weight, under the name by which AutoEP looks for it."""
        return self.gate.weight

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, D]` tokens → the chosen experts' normalised weights (fp32) and their indices, both `[T, top_k]`."""
        probabilities = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts


class Experts(nn.Module):
    """E SwiGLU feed-forwards, each applied to the tokens that chose it."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        size = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, size))

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """`tokens` `[T, D]`, `weights` and `experts` `[T, top_k]` → the weighted sum of the experts' outputs `[T, D]`."""
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(self.down_proj)).tolist()
        outputs = [
            swiglu(part, gate_up, down)
            for part, gate_up, down in zip(
                tokens[order // top_k].split(counts), self.gate_up_proj, self.down_proj, strict=True
            )
        ]
        # Undo the sort, then weigh and add in fp32, as AutoEP does it.
        chosen = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, top_k))
        return (chosen * weights.unsqueeze(-1)).sum(1).to(tokens.dtype)


class SharedExpert(nn.Module):
    """One SwiGLU feed-forward that every token passes."""

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
    """One expert: `tokens` `[n, D]`, `gate_up` `[2I, D]`, `down` `[D, I]` → `[n, D]` (Shazeer 2020)."""
    gate, up = F.linear(tokens, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def router_logits(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The gate's logits `[B, T, E]` of this block or of the AutoEP layer that took its place.

    The gate is small (E columns), so asking it again costs less than carrying its logits out of a block whose
    forward may have been replaced, and it is right under every kind of activation checkpointing.
    """
    return block.router.gate(hidden)

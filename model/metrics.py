"""What is measured while training, as sums over tokens that ranks can add up."""

from __future__ import annotations

import torch

from model.moe import choose_experts


def count_tokens(batch: dict[str, torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The two counts that losses are divided by: `supervised` tokens and non-padding `tokens` of one micro-batch."""
    return {
        "supervised": (batch["labels"][:, 1:] != -100).sum(),
        "tokens": (batch["input_ids"] != pad_token_id).sum(),
    }


@torch.no_grad()
def routing_statistics(
    router_logits: torch.Tensor,
    retained_ratio: torch.Tensor,
    text: torch.Tensor,
    top_k: int,
    selection_bias: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Sums over the non-padding tokens of a batch, fp32.

    `router_logits` `[L, B, T, E]`, `retained_ratio` `[B, T]`, `text` bool `[B, T]`, `selection_bias` `[L, E]` (with which
    the routers chose) → `routing` `[L, E]` (sum of probabilities), `load` `[L, E]` (how often an expert was chosen),
    `router_entropy` `[L]` (of each token's probabilities, in nats), `retained_ratio` `[]`.
    """
    probabilities = router_logits[:, text].float().softmax(-1)  # [L, M, E]
    chosen = choose_experts(probabilities, selection_bias.unsqueeze(1), top_k).flatten(1)
    load = probabilities.new_zeros(selection_bias.shape).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=torch.float32)
    )
    return {
        "routing": probabilities.sum(1),
        "load": load,
        "router_entropy": torch.special.entr(probabilities).sum((1, 2)),
        "retained_ratio": retained_ratio[text].sum(),
    }


def load_max_over_mean(load: torch.Tensor) -> torch.Tensor:
    """How much more than its fair share the busiest expert of each layer gets: `[L, E]` counts → `[L]`, 1 = balanced."""
    return load.amax(-1) / load.mean(-1).clamp(min=torch.finfo(load.dtype).tiny)

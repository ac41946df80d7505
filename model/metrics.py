"""Training statistics, as sums over tokens that can be added over ranks."""

from __future__ import annotations

import torch

from model.moe import choose_experts


def count_tokens(batch: dict[str, torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Count what losses are divided by: the `supervised` tokens and the non-padding `tokens` of a micro-batch."""
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
    """Sum routing statistics over the non-padding tokens of a batch, in fp32.

    Takes `router_logits` `[L, B, T, E]`, `retained_ratio` `[B, T]`, `text` bool `[B, T]`, and `selection_bias` `[L, E]`,
    the bias with which the routers chose. Returns:

    - `routing` `[L, E]`: the sum of probabilities
    - `load` `[L, E]`: how often each expert was chosen
    - `router_entropy` `[L]`: the sum of the entropies of each token's probabilities, in nats
    - `retained_ratio` `[]`: the sum of the ratios
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
    """Divide each layer's busiest expert's load by the mean load: `[L, E]` counts → `[L]`; 1 is balanced."""
    return load.amax(-1) / load.mean(-1).clamp(min=torch.finfo(load.dtype).tiny)

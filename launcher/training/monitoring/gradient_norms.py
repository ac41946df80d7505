"""Gradient norms by group of layers, computed from the pieces that ZeRO leaves on each rank."""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# A parameter belongs to the first group with a part that occurs in its name.
GROUPS = {
    "norms": ("norm.weight",),
    "embedding": ("embed_tokens.", "liquid_embedding.", "lm_head."),
    "attention": (".attention.",),
    "convolution": (".convolution.",),
    "memory": (".memory.",),
    "router": (".moe.router.",),
    "experts": (".moe.",),
}


def group_of(name: str) -> str:
    """Return the group of a parameter, given its name before or after AutoEP renames it."""
    for group, parts in GROUPS.items():
        # "norm.weight" also matches `attention_norm.weight`, which is a norm as well.
        if any(part in f".{name}" for part in parts):
            return group
    raise ValueError(
        f"the parameter {name} is in no group; add it to GROUPS in launcher/training/monitoring/gradient_norms.py"
    )


@torch.no_grad()
def gradient_norms(engine: DeepSpeedEngine) -> dict[str, float]:
    """Return the gradient norm of each group, before clipping and without the loss scale.

    Called by all ranks between a step's last backward and `engine.step()`. Under ZeRO each element of the gradient is on
    exactly one rank, including those of experts, so the squares are summed over all ranks. The result is empty if ZeRO
    is off, because every rank then has the whole gradient.
    """
    if engine.zero_optimization_stage() == 0:
        return {}
    squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=engine.device)
    places = {group: place for place, group in enumerate(GROUPS)}
    for name, parameter in engine.module.named_parameters():
        piece = _own_piece(parameter)
        if piece is not None:
            squares[places[group_of(name)]] += torch.linalg.vector_norm(piece.float()).double().square()
    dist.all_reduce(squares)
    scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    return dict(zip(GROUPS, (squares.sqrt() / scale).tolist(), strict=True))


def _own_piece(parameter: Any) -> torch.Tensor | None:
    """Return the part of a parameter's averaged gradient that this rank's optimizer uses; None if it has no part."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        return safe_get_local_grad(parameter)
    mapping = getattr(parameter, "_hp_mapping", None)  # ZeRO-1 and ZeRO-2
    return None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)

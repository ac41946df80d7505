"""Read the values of a DeepSpeed JSON that several parts of a run need."""

from __future__ import annotations

from typing import Any

PRECISIONS = ("fp16", "bf16")  # the sections that enable them; without one, training is in fp32


def value_at(content: dict, location: str) -> Any:
    """Return the value at `section.key`; None if there is none."""
    for part in location.split("."):
        if not isinstance(content, dict) or part not in content:
            return None
        content = content[part]
    return content


def precision(content: dict) -> str:
    """Return `fp16`, `bf16` or `fp32`."""
    return next((name for name in PRECISIONS if value_at(content, f"{name}.enabled")), "fp32")


def zero_stage(content: dict) -> int:
    """Return the ZeRO stage; DeepSpeed's default is 0."""
    return value_at(content, "zero_optimization.stage") or 0


def spreads_experts(content: dict) -> bool:
    """Return whether AutoEP is enabled."""
    return bool(value_at(content, "expert_parallel.enabled"))


def expert_parallel_size(resolved: dict) -> int:
    """Return over how many ranks a resolved JSON spreads each layer's experts."""
    return value_at(resolved, "expert_parallel.autoep_size") or 1

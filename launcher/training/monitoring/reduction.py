"""Sums over ranks: all that a step has to add up, in one collective."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist


def add_up(sums: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Add up tensors by name over this rank's micro-batches and over all ranks; the result is on the CPU in fp64."""
    parts = [torch.cat([value.detach().double().flatten() for value in part.values()]) for part in sums]
    flat = functools.reduce(torch.add, parts)
    dist.all_reduce(flat)
    totals = flat.cpu().split([value.numel() for value in sums[0].values()])
    return {name: part.view(value.shape) for (name, value), part in zip(sums[0].items(), totals, strict=True)}

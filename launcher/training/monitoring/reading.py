"""Rows that a rank cannot read: all ranks learn of it at the same batch, and none waits for another in a collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError

Batch = TypeVar("Batch")


def read_together(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Give this rank's batches, of which all ranks have as many; all of them take the next one at the same time.

    Raises `DataError` on all ranks where one cannot read its own, with what it says.
    """
    reading = iter(batches)
    while True:
        batch = problem = None
        try:
            batch = next(reading, None)
        except (DataError, OSError) as error:
            problem = str(error)
        lost = torch.tensor(float(problem is not None), device=device)
        dist.all_reduce(lost)
        if lost.item() > 0:
            raise DataError(first_error(problem))
        if batch is None:
            return
        yield batch


def first_error(own: str | None) -> str | None:
    """What the first rank that has an error says; called by all ranks, each with its own or None."""
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, own)
    return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), None)

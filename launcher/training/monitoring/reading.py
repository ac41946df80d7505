"""Reading errors shared between ranks, so that no rank waits in a collective for one that failed to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError

Batch = TypeVar("Batch")


def read_together(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield this rank's batches, in step with all other ranks. All ranks must have the same number of batches.

    Raises `DataError` on all ranks if one cannot read its batch, with that rank's message.
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
    """Return the error of the first rank that has one; called by all ranks, each with its own error or None."""
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, own)
    return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), None)

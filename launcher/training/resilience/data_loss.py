"""Batches that a rank cannot read: all ranks learn of it at that step and stop with a checkpoint of the step before."""

from __future__ import annotations

import torch

from data_pipeline.errors import DataError
from data_pipeline.loading.prefetch import Prefetcher
from launcher.training.monitoring.reading import first_error


class AgreedBatches(Prefetcher):
    """A `Prefetcher` that turns a read error into a number that ranks can add up.

    If one rank raised instead, the others would wait in a collective, and the steps since the last checkpoint would be
    lost.
    """

    _error: str | None = None

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """Return this rank's micro-batches like `Prefetcher.next_step`; if they cannot be read, one batch of padding only."""
        try:
            return super().next_step()
        except (DataError, OSError) as error:
            self._error = str(error)
            data = self.stream.data
            row = torch.full((1, data.seq_len), data.pad_token_id)
            return [{"input_ids": row, "labels": torch.full_like(row, -100), "position_ids": torch.zeros_like(row)}]

    def lost(self, device: torch.device) -> torch.Tensor:
        """Return 1 if this rank could not read the last step, else 0; sum it over the ranks."""
        return torch.tensor(float(self._error is not None), device=device)

    def raise_lost(self) -> None:
        """Raise `DataError` on every rank if any rank could not read the last step; all ranks must call it."""
        if told := first_error(self._error):
            raise DataError(
                f"{told}; training stopped before the step that needs this data and resumes there when it is started again"
            )

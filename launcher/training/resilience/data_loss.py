"""Batches that a rank cannot read: all ranks learn of it at that step, and stop with a checkpoint of the one before."""

from __future__ import annotations

import torch

from data_pipeline.errors import DataError
from data_pipeline.loading.prefetch import Prefetcher
from launcher.training.monitoring.reading import first_error


class AgreedBatches:
    """The batches of a `Prefetcher`, with an error in making them as a number that ranks can add up.

    A rank that raised would leave the others waiting in a collective, and the steps since the last checkpoint be lost.
    """

    def __init__(self, batches: Prefetcher) -> None:
        self._batches = batches
        self._error: str | None = None

    @property
    def position(self) -> int:
        return self._batches.position

    @property
    def seconds_waited(self) -> float:
        return self._batches.seconds_waited

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches, as of `Prefetcher.next_step`; where they cannot be read, one without a token."""
        try:
            return self._batches.next_step()
        except (DataError, OSError) as error:
            self._error = str(error)
            stream = self._batches.stream
            row = torch.full((1, stream.data.seq_len), stream.data.pad_token_id)
            return [{"input_ids": row, "labels": torch.full_like(row, -100), "position_ids": torch.zeros_like(row)}]

    def lost(self, device: torch.device) -> torch.Tensor:
        """1 where the last step could not be read on this rank, to be added up over the ranks."""
        return torch.tensor(float(self._error is not None), device=device)

    def raise_lost(self) -> None:
        """Raise `DataError` on all ranks where one could not read the last step, with what it says; all ranks call it."""
        if told := first_error(self._error):
            raise DataError(
                f"{told}; training has stopped before the step that needs it, and goes on there when it is started again"
            )

    def close(self) -> None:
        self._batches.close()

"""Batches as a pure function of data, seed and position. The numbers of ranks and threads make no difference."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.errors import DataError
from data_pipeline.loading.collate import ARRAYS, LOSS_ON, BatchMemory, collate, source_of_tokens
from data_pipeline.loading.row_reader import NO_ROW, RowReader

# Reusable memory for this many groups; a step that needs more allocates new memory.
GROUPS_KEPT = 64
# Rows collated at once: enough to make the overhead of calls negligible, few enough for the processor's cache.
GROUP_ROWS = 128


class BatchStream:
    """One rank's share of the endless stream of global batches.

    position: the number of rows that all ranks together have taken from the stream. It is the whole state, and it is valid
    at any world size.
    loss_on: `all`, or `answer` to supervise only the answer and its `</s>`.
    Raises DataError if the global batch cannot be divided into the ranks' micro-batches.
    """

    def __init__(
        self,
        data: RowReader,
        *,
        seed: int,
        global_batch_rows: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        loss_on: str = "all",
        position: int = 0,
    ) -> None:
        _check(data, loss_on, rank, world_size)
        self.accumulation = _accumulation(global_batch_rows, micro_batch_rows, world_size)
        self.data = data
        self.global_batch_rows = global_batch_rows
        self.micro_batch_rows = micro_batch_rows
        self.rank = rank
        self.loss_on = loss_on
        self.position = position
        self.order = data.order(seed)
        self._memory = BatchMemory(GROUPS_KEPT)

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """Return this rank's `accumulation` micro-batches of the next global batch, and advance the position.

        A micro-batch has input_ids, labels and position_ids, int64 `[micro_batch_rows, seq_len]`, as from `collate`.
        Rows of skipped shards are all padding.
        """
        micro_batches = self.step_at(self.position)
        self.position += self.global_batch_rows
        return micro_batches

    def step_at(self, position: int) -> list[dict[str, torch.Tensor]]:
        """Return the micro-batches of the step that begins at a position. The state does not change; thread-safe."""
        self.data.look_ahead(self.order.shards_ahead(position))
        first = position + self.rank * self.accumulation * self.micro_batch_rows
        rows = self.order.rows(np.arange(first, first + self.accumulation * self.micro_batch_rows))
        # Several small micro-batches are collated together, as long as the group fits into the processor's cache.
        group_rows = self.micro_batch_rows * max(1, GROUP_ROWS // self.micro_batch_rows)
        micro_batches = []
        for start in range(0, len(rows), group_rows):
            read = self.data.gather(rows[start : start + group_rows])
            memory = self._memory.take((len(ARRAYS), *read.tokens.shape))
            collate(read, self.data.pad_token_id, self.loss_on, out=memory)
            for first_row in range(0, len(read.tokens), self.micro_batch_rows):
                micro_batches.append(_tensors(memory[:, first_row : first_row + self.micro_batch_rows]))
        return micro_batches


class ValidationBatch(NamedTuple):
    """The inputs of a validation batch and the source of every token, all int64 `[micro_batch_rows, seq_len]`.

    inputs: input_ids, labels and position_ids. sources: indices into `RowReader.sources`, -1 at padding.
    """

    inputs: dict[str, torch.Tensor]
    sources: torch.Tensor


class ValidationBatches:
    """One rank's share of the rows of a folder. All ranks together read every row once, in order.

    Every rank has the same number of batches; rows of padding without labels fill up the last ones.
    """

    def __init__(
        self, data: RowReader, *, micro_batch_rows: int, rank: int, world_size: int, loss_on: str = "all"
    ) -> None:
        _check(data, loss_on, rank, world_size)
        if micro_batch_rows < 1:
            raise DataError(f"micro_batch_rows is {micro_batch_rows}: it must be at least 1")
        self.data = data
        self.micro_batch_rows = micro_batch_rows
        self.rank = rank
        self.world_size = world_size
        self.loss_on = loss_on

    def __len__(self) -> int:
        return -(-self.data.num_rows // (self.micro_batch_rows * self.world_size))

    def __iter__(self) -> Iterator[ValidationBatch]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.micro_batch_rows
            rows = np.arange(first, first + self.micro_batch_rows)
            read = self.data.gather(np.where(rows < self.data.num_rows, rows, NO_ROW))
            inputs = _tensors(collate(read, self.data.pad_token_id, self.loss_on))
            yield ValidationBatch(inputs, torch.from_numpy(source_of_tokens(read)))


def _tensors(arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return dict(zip(ARRAYS, torch.from_numpy(arrays).unbind(), strict=True))


def _check(data: RowReader, loss_on: str, rank: int, world_size: int) -> None:
    if data.num_rows == 0:
        raise DataError(f"{data.location} has no rows: prepare it from more data")
    if loss_on not in LOSS_ON:
        raise DataError(f"loss_on is {loss_on!r}: give one of {', '.join(LOSS_ON)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")


def _accumulation(global_batch_rows: int, micro_batch_rows: int, world_size: int) -> int:
    rows_at_once = micro_batch_rows * world_size
    if rows_at_once < 1 or global_batch_rows < 1:
        raise DataError(
            f"global_batch_rows {global_batch_rows}, micro_batch_rows {micro_batch_rows} and world size {world_size} "
            "must all be at least 1"
        )
    accumulation, rest = divmod(global_batch_rows, rows_at_once)
    if rest:
        valid = [rows for rows in (accumulation * rows_at_once, (accumulation + 1) * rows_at_once) if rows]
        raise DataError(
            f"global_batch_rows {global_batch_rows} is not a multiple of micro_batch_rows {micro_batch_rows} × "
            f"world size {world_size}; the nearest multiples: {' and '.join(map(str, valid))}"
        )
    return accumulation

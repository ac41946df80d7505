"""The order of rows, and the batches: a pure function of (folder, seed, position), whatever the number of ranks."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from data_pipeline.errors import DataError
from data_pipeline.reader import ShardFolder

SHARDS_PER_BLOCK = 16  # rows are shuffled within blocks of this many shards, so that reading stays local
IGNORE_INDEX = -100  # what the loss leaves out
LOSS_ON = ("all", "answer")


class RowOrder:
    """The endless order of a folder's rows: every epoch is a permutation of its own."""

    def __init__(self, num_rows: int, fingerprint: str, seed: int, rows_per_file: Sequence[int]) -> None:
        if num_rows != sum(rows_per_file):
            raise ValueError(f"{num_rows} rows, and {sum(rows_per_file)} in the files")
        self.num_rows = num_rows
        self.fingerprint = fingerprint
        self.seed = seed
        self.rows_per_file = np.asarray(rows_per_file, dtype=np.int64)
        # A batch may straddle two epochs; a third is never in use.
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def row(self, position: int) -> int:
        """Gives the row at a position of the endless stream."""
        epoch, index = divmod(position, self.num_rows)
        return int(self._permutation(epoch)[index])

    def _shuffle(self, epoch: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.fingerprint}:{self.seed}:{epoch}".encode()).digest()
        generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        first_rows = np.cumsum(self.rows_per_file) - self.rows_per_file
        shards = _permutation(generator, len(self.rows_per_file))
        blocks = []
        for start in range(0, len(shards), SHARDS_PER_BLOCK):
            block = shards[start : start + SHARDS_PER_BLOCK]
            rows = np.concatenate([np.arange(first_rows[s], first_rows[s] + self.rows_per_file[s]) for s in block])
            blocks.append(rows[_permutation(generator, len(rows))])
        return np.concatenate(blocks)


def _permutation(generator: np.random.Philox, length: int) -> np.ndarray:
    # A bit generator's raw stream is the same in every numpy version; what Generator.permutation makes of it is not.
    return np.argsort(generator.random_raw(length), kind="stable")


class BatchStream:
    """One rank's share of the endless stream of global batches.

    position: rows of the stream that all ranks together have taken; it is the whole state, and valid at any world size.
    loss_on: `all`, or `answer` to supervise the answer and its `</s>` alone.
    Raises DataError where the global batch does not divide into the ranks' micro-batches.
    """

    def __init__(
        self,
        folder: ShardFolder,
        *,
        seed: int,
        global_batch_rows: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        loss_on: str = "all",
        position: int = 0,
    ) -> None:
        if loss_on not in LOSS_ON:
            raise DataError(f"loss_on is {loss_on!r}: give one of {', '.join(LOSS_ON)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of a world of {world_size}")
        self.accumulation = _accumulation(global_batch_rows, micro_batch_rows, world_size)
        self.folder = folder
        self.global_batch_rows = global_batch_rows
        self.micro_batch_rows = micro_batch_rows
        self.rank = rank
        self.loss_on = loss_on
        self.position = position
        self.order = RowOrder(folder.num_rows, folder.fingerprint, seed, folder.rows_per_file)

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """Gives this rank's `accumulation` micro-batches of the next global batch, and moves the position past it.

        A micro-batch holds input_ids, labels and position_ids, int64 `[micro_batch_rows, seq_len]`. Labels stand at
        their own tokens, the model shifts them; -100 is at the first token of every piece, at padding and, where the
        loss is on answers, at questions. Positions begin at 0 at every piece and at the padding.
        """
        first = self.position + self.rank * self.accumulation * self.micro_batch_rows
        micro_batches = []
        for start in range(first, first + self.accumulation * self.micro_batch_rows, self.micro_batch_rows):
            rows = [self.order.row(position) for position in range(start, start + self.micro_batch_rows)]
            micro_batches.append(self._collate(rows))
        self.position += self.global_batch_rows
        return micro_batches

    def _collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        shape = (len(rows), self.folder.seq_len)
        batch = {name: np.empty(shape, dtype=np.int64) for name in ("input_ids", "labels", "position_ids")}
        for index, row in enumerate(rows):
            tokens, spans = self.folder.read(row)
            batch["input_ids"][index] = batch["labels"][index] = tokens
            batch["labels"][index, ~supervised(spans, len(tokens), self.loss_on)] = IGNORE_INDEX
            batch["position_ids"][index] = position_ids(spans, len(tokens))
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def supervised(spans: np.ndarray, seq_len: int, loss_on: str) -> np.ndarray:
    """Tells which tokens of a row are targets: bool `[seq_len]`."""
    starts, answer_starts, ends = spans[:, 0], spans[:, 1], spans[:, 2]
    change = np.zeros(seq_len + 1, dtype=np.int64)
    np.add.at(change, answer_starts if loss_on == "answer" else starts, 1)
    np.add.at(change, ends, -1)
    targets = np.cumsum(change[:-1]) > 0
    targets[starts] = False  # nothing stands before it that could predict it
    return targets


def position_ids(spans: np.ndarray, seq_len: int) -> np.ndarray:
    """Gives the position of every token in its piece, int64 `[seq_len]`; padding counts as one more piece."""
    origins = np.zeros(seq_len + 1, dtype=np.int64)
    origins[spans[:, 0]] = spans[:, 0]
    origins[spans[-1, 2]] = spans[-1, 2]
    return np.arange(seq_len) - np.maximum.accumulate(origins[:-1])


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
            f"world size {world_size}: the nearest that are: {' and '.join(map(str, valid))}"
        )
    return accumulation

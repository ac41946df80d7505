"""Turn packed rows into input_ids, labels and position_ids, for a whole batch at once."""

import sys
import threading
from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows

IGNORE_INDEX = -100  # labels with this value do not count in the loss
NO_SOURCE = -1  # the source of padding
LOSS_ON = ("all", "answer")
ARRAYS = ("input_ids", "labels", "position_ids")
START, ANSWER_START, END, SOURCE, INPUT_ROW, OFFSET = range(len(SPAN_COLUMNS))


class Pieces:
    """The pieces of a batch. The last piece of each row is its padding, which is empty if the row is full.

    starts, answer_starts, ends: int64 `[pieces + rows]`, positions in the flattened batch.
    sources: int64 `[pieces + rows]`, NO_SOURCE for padding.
    continues: bool `[pieces + rows]`, whether a piece is the next turn of the document that the piece before it is from;
    None if no piece is.
    Raises DataError if the spans of a row do not fill it from its start without gaps.
    """

    def __init__(self, rows: PackedRows) -> None:
        count, seq_len = rows.tokens.shape
        columns = np.empty((4, len(rows.spans) + count), dtype=np.int64)
        paddings = np.cumsum(rows.pieces + 1) - 1
        is_padding = np.zeros(columns.shape[1], dtype=bool)
        is_padding[paddings] = True
        columns[:, ~is_padding] = rows.spans[:, (START, ANSWER_START, END, SOURCE)].T
        columns[END, paddings] = columns[ANSWER_START, paddings] = seq_len
        columns[SOURCE, paddings] = NO_SOURCE
        # Padding begins where the piece before it ends. In a row without pieces it begins at 0, because the piece before
        # it is in another row.
        columns[START, paddings] = np.where(rows.pieces > 0, columns[END, paddings - 1], 0)
        self.starts, self.answer_starts, self.ends, self.sources = columns
        self._check(paddings)
        self.continues: np.ndarray | None = None
        if rows.spans[:, OFFSET].any():  # most batches hold only whole documents of a single turn
            self.continues = np.zeros(columns.shape[1], dtype=bool)
            self.continues[~is_padding] = _continues(rows)
        columns[:SOURCE] += np.repeat(np.arange(count) * seq_len, rows.pieces + 1)
        self.lengths = self.ends - self.starts

    def _check(self, paddings: np.ndarray) -> None:
        previous_ends = np.concatenate([[0], self.ends[:-1]])
        previous_ends[paddings[:-1] + 1] = 0  # a row's first piece
        sound = (
            np.array_equal(self.starts, previous_ends)
            and (self.starts <= self.answer_starts).all()
            and (self.answer_starts <= self.ends).all()
        )
        if not sound:
            raise DataError(
                "a row's spans break the format of shards: run `lfm verify` on the folder, then prepare it again"
            )


def _continues(rows: PackedRows) -> np.ndarray:
    """Tell which pieces follow the piece before them in their document as well as in their row, bool `[pieces]`."""
    spans = rows.spans
    continues = np.zeros(len(spans), dtype=bool)
    before, after = spans[:-1], spans[1:]
    lengths = before[:, END] - before[:, START]
    continues[1:] = (after[:, INPUT_ROW] == before[:, INPUT_ROW]) & (after[:, OFFSET] == before[:, OFFSET] + lengths)
    continues[1:] &= after[:, START] > 0
    return continues


def collate(rows: PackedRows, pad_token_id: int, loss_on: str, out: np.ndarray | None = None) -> np.ndarray:
    """Return input_ids, labels and position_ids, int64 `[3, n, seq_len]`, written into `out` if it is given.

    Labels are aligned with their own tokens; the model shifts them. Labels are -100 at the first token of every piece, at
    padding and, if the loss is on answers, at prompts. Positions restart at 0 at every piece and at the padding, but
    continue through all turns of one document.
    Raises DataError if the spans do not follow the format.
    """
    pieces = Pieces(rows)
    if out is None:
        out = np.empty((len(ARRAYS), *rows.tokens.shape), dtype=np.int64)
    input_ids, labels, position_ids = out
    np.copyto(input_ids, rows.tokens)
    if (rows.pieces == 0).any():
        input_ids[rows.pieces == 0] = pad_token_id
    np.copyto(labels, input_ids)
    np.copyto(labels, IGNORE_INDEX, where=_ignored(pieces, loss_on).reshape(labels.shape))
    _fill_positions(position_ids.reshape(-1), pieces)
    return out


def source_of_tokens(rows: PackedRows) -> np.ndarray:
    """Return the source of every token, int64 `[n, seq_len]`, with NO_SOURCE at padding."""
    pieces = Pieces(rows)
    return np.repeat(pieces.sources, pieces.lengths).reshape(rows.tokens.shape)


def _ignored(pieces: Pieces, loss_on: str) -> np.ndarray:
    """Tell which tokens are not targets of the loss, bool `[n · seq_len]`."""
    # Every piece is a run of ignored tokens and then a run of targets. Its first token is always ignored, because the
    # piece has nothing before it to predict it from.
    ignored = np.ones_like(pieces.starts) if loss_on == "all" else np.maximum(pieces.answer_starts - pieces.starts, 1)
    padding = pieces.sources == NO_SOURCE
    ignored[padding] = pieces.lengths[padding]
    runs = np.stack([ignored, pieces.lengths - ignored], axis=1).reshape(-1)
    return np.repeat(np.tile([True, False], len(ignored)), runs)


def _fill_positions(positions: np.ndarray, pieces: Pieces) -> None:
    # A position is one above the one before, except at the start of a document, where it is 0. So a single in-place
    # cumulative sum over the batch suffices.
    lengths = pieces.lengths
    if pieces.continues is not None:
        lengths = np.add.reduceat(lengths, np.flatnonzero(~pieces.continues))
    lengths = lengths[lengths > 0]
    positions[:] = 1
    positions[0] = 0
    positions[np.cumsum(lengths)[:-1]] = 1 - lengths[:-1]
    np.cumsum(positions, out=positions)


class BatchMemory:
    """Memory for batches, reused once a batch is no longer referenced. Fresh memory pages cost more than filling them.

    kept: the number of arrays to keep. If all of them are in use, new memory is allocated.
    """

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int]) -> np.ndarray:
        """Return an int64 array that nothing else references, with arbitrary contents."""
        with self._lock:
            for index in range(len(self._arrays)):
                array = self._arrays[index]
                # Tensors and views of an array hold references to it. An unused array has three: the list, `array` and
                # the argument of getrefcount.
                if array.shape == tuple(shape) and sys.getrefcount(array) == 3:
                    return array
            array = np.empty(shape, dtype=np.int64)
            self._arrays = [*self._arrays, array][-self.kept :]
            return array

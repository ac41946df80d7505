"""Check that the pieces of all shards together make up every document, whole and exactly once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShardPieces:
    """The pieces of one shard, in a compact form, since most documents are a single piece.

    whole: int64 `[documents surely in one piece]`, their input rows.
    parts: int64 `[other pieces, 8]`: input row, offset, length, source, has a token of the answer, begins within the
    answer, begins a turn, ends a turn.
    documents: the number of documents that begin in the shard.
    """

    whole: np.ndarray
    parts: np.ndarray
    documents: int


def shard_pieces(spans: np.ndarray, opened: np.ndarray, closed: np.ndarray, seq_len: int) -> ShardPieces:
    """Gather the pieces of a shard. opened, closed: bool `[pieces]`, whether each piece begins, and ends, a turn."""
    starts, answer_starts, ends, sources, input_rows, offsets = spans.T
    is_whole = (offsets == 0) & closed
    # Another turn may follow: in this row, or in another one if this one is full.
    is_whole[:-1] &= (offsets[1:] == 0) | (input_rows[1:] != input_rows[:-1])
    is_whole &= ends < seq_len
    parts = (input_rows, offsets, ends - starts, sources, answer_starts < ends, answer_starts == starts, opened, closed)
    return ShardPieces(
        np.ascontiguousarray(input_rows[is_whole]),
        np.stack([column[~is_whole].astype(np.int64) for column in parts], axis=1),
        int((offsets == 0).sum()),
    )


class PieceLedger:
    """The pieces of all shards. Shards are numbered by their place in the given sequence.

    folders: the number of the folder that each shard is in. A document must not span two folders.
    """

    def __init__(self, shards: Sequence[ShardPieces], folders: Sequence[int]) -> None:
        whole = np.concatenate([shard.whole for shard in shards])
        whole_shards = np.repeat(np.arange(len(shards)), [len(shard.whole) for shard in shards])
        parts = np.concatenate([shard.parts for shard in shards])
        part_shards = np.repeat(np.arange(len(shards)), [len(shard.parts) for shard in shards])
        folder = np.asarray(folders)[part_shards]
        order = np.lexsort((parts[:, 1], folder, parts[:, 0]))
        self._parts, self._part_shards = parts[order], part_shards[order]
        self._begins = (
            (np.diff(self._parts[:, 0], prepend=-1) != 0)
            | (np.diff(folder[order], prepend=-1) != 0)
            | (self._parts[:, 1] == 0)
        )
        self._rows = np.concatenate([whole, self._parts[self._begins, 0]])
        self._row_shards = np.concatenate([whole_shards, self._part_shards[self._begins]])

    def problems(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield each fault, with the numbers of the shards that it is in."""
        broken_rows = self._parts[self._broken(), 0]
        places = np.isin(self._parts[:, 0], broken_rows)
        yield from _by_shards(
            self._parts[places, 0], self._part_shards[places], "has pieces that do not form one whole document"
        )
        order = np.argsort(self._rows, kind="stable")
        rows, shards = self._rows[order], self._row_shards[order]
        again = np.diff(rows, prepend=-1) == 0
        again[:-1] |= again[1:]
        yield from _by_shards(rows[again], shards[again], "occurs more than once")

    def _broken(self) -> np.ndarray:
        """Tell which pieces do not continue the piece before them, or leave their document incomplete, bool `[pieces]`."""
        _, offsets, lengths, sources, has_answer, within_answer, opened, closed = self._parts.T
        continues = ~self._begins
        broken = self._begins & (offsets != 0)
        broken[1:] |= (
            continues[1:]
            & (
                (offsets[1:] != offsets[:-1] + lengths[:-1])
                | (sources[1:] != sources[:-1])
                | (closed[:-1] != opened[1:])  # the next turn begins if the one before has ended, and only then
                | ((has_answer[:-1] == 1) & (within_answer[1:] == 0) & (opened[1:] == 0))
            )
        )
        is_last = np.append(self._begins[1:], True)[: len(broken)]
        return broken | (is_last & (closed == 0))


def _by_shards(rows: np.ndarray, shards: np.ndarray, what: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """Join input rows with the same fault in the same shards into one message. The input rows must be in order."""
    found: dict[tuple[int, ...], list[int]] = {}
    first_places = np.flatnonzero(np.diff(rows, prepend=-1))
    for row, at in zip(rows[first_places].tolist(), np.split(shards, first_places[1:]), strict=False):
        found.setdefault(tuple(sorted(set(at.tolist()))), []).append(row)
    for numbers, faulty in found.items():
        more = f" (and {len(faulty) - 1} more like it)" if len(faulty) > 1 else ""
        yield numbers, f"input row {faulty[0]}{more} {what}"

"""Packing of documents into rows of a fixed number of tokens by best fit; long documents span several rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPAN_COLUMNS = ("start", "answer_start", "end", "source", "input_row", "offset")
# Copy n of input row r, which an augmentation made, has the input row r + n · FIRST_COPY.
FIRST_COPY = 2**40


@dataclass(frozen=True)
class Documents:
    """Documents before packing, concatenated. A document has one or more turns: each a prompt and its answer.

    ids: `[tokens]`.
    lengths: `[turns]`, in tokens.
    answer_starts: `[turns]`, index within the turn of the answer's first token.
    sources: `[documents]`, index into the source names.
    input_rows: `[documents]`, index of the document's row in the input.
    turns: `[documents]`, the number of turns of each document; None if every document has one.
    """

    ids: np.ndarray
    lengths: np.ndarray
    answer_starts: np.ndarray
    sources: np.ndarray
    input_rows: np.ndarray
    turns: np.ndarray | None = None

    @property
    def document_lengths(self) -> np.ndarray:
        """Return the length of each document in tokens, `[documents]`."""
        if self.turns is None:
            return self.lengths
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.diff(ends[np.concatenate([[0], np.cumsum(self.turns)])])


@dataclass(frozen=True)
class PackedRows:
    """Packed rows.

    tokens: `[rows, seq_len]`, padded at the end of each row.
    spans: int64 `[pieces, 6]` in SPAN_COLUMNS' order, row by row. A piece is a turn, or the part of one that is in this
    row. start, answer_start and end are positions in the row; offset is the piece's start in its document. A piece without
    answer tokens has answer_start equal to its end. Padding has no span.
    pieces: `[rows]`, the number of spans in each row.
    """

    tokens: np.ndarray
    spans: np.ndarray
    pieces: np.ndarray


def pack(documents: Documents, seq_len: int, pad_token_id: int, dtype: type[np.integer]) -> PackedRows:
    """Pack a group of documents into rows of seq_len tokens; the group's size bounds the memory.

    A document longer than a row fills whole rows, and its remainder is packed like a short document. Documents are placed
    longest first, each into the row with the least free space that still holds it. The rows are ordered by their first
    documents, and so are the documents within a row.
    """
    lengths = documents.document_lengths
    owner, offset, length = _parts(lengths, seq_len)
    rows = best_fit(length.tolist(), seq_len)
    rows.sort(key=lambda row: row[0])
    parts_per_row = np.array([len(row) for row in rows], dtype=np.int64)
    order = np.array([part for row in rows for part in row], dtype=np.int64)
    owner, offset, length = owner[order], offset[order], length[order]
    row = np.repeat(np.arange(len(rows)), parts_per_row)
    starts = np.cumsum(length) - length
    in_row = starts - starts[np.cumsum(parts_per_row) - parts_per_row][row]
    begin = (np.cumsum(lengths) - lengths)[owner] + offset

    tokens = np.full((len(rows), seq_len), pad_token_id, dtype=dtype)
    flat = tokens.reshape(-1)
    for to, source, size in zip((row * seq_len + in_row).tolist(), begin.tolist(), length.tolist(), strict=True):
        flat[to : to + size] = documents.ids[source : source + size]
    part, spans = _spans(documents, owner, begin, length, in_row)
    return PackedRows(tokens, spans, np.bincount(row[part], minlength=len(rows)))


def _spans(
    documents: Documents, owner: np.ndarray, begin: np.ndarray, length: np.ndarray, in_row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut parts of documents where turns end; return each piece's part, and the spans.

    owner, begin, length, in_row: `[parts]`, the document, the first token among all tokens, the size, and the position in
    the row.
    """
    turn_ends = np.cumsum(documents.lengths)
    turn_starts = turn_ends - documents.lengths
    first_turn = np.searchsorted(turn_ends, begin, side="right")
    pieces = np.searchsorted(turn_ends, begin + length - 1, side="right") - first_turn + 1
    part = np.repeat(np.arange(len(begin)), pieces)
    turn = first_turn[part] + np.arange(len(part)) - (np.cumsum(pieces) - pieces)[part]

    starts = np.maximum(begin[part], turn_starts[turn])
    sizes = np.minimum((begin + length)[part], turn_ends[turn]) - starts
    prompts = np.clip(turn_starts[turn] + documents.answer_starts[turn] - starts, 0, sizes)
    at = in_row[part] + starts - begin[part]
    owner = owner[part]
    offsets = starts - (np.cumsum(documents.document_lengths) - documents.document_lengths)[owner]
    columns = (at, at + prompts, at + sizes, documents.sources[owner], documents.input_rows[owner], offsets)
    return part, np.stack(columns, axis=1).astype(np.int64)


def _parts(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into parts of at most one row; return each part's document, its offset there and its length."""
    counts = -(-lengths.astype(np.int64) // seq_len)
    owner = np.repeat(np.arange(len(lengths)), counts)
    offset = (np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]) * seq_len
    return owner, offset, np.minimum(seq_len, lengths[owner] - offset)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over bins, longest first, each into the fullest bin that still holds it.

    Lengths must lie between 1 and the capacity. Returns the indices of each bin's items in ascending order. Items of equal
    length are placed in input order, so the result depends only on the lengths.
    """
    bins: list[list[int]] = []
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r is set if some bin has exactly r tokens free, so a shift finds the tightest fit
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = bins_with_room[room].pop()
            if not bins_with_room[room]:
                occupied ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if room > length:
            bins_with_room[room - length].append(chosen)
            occupied |= 1 << (room - length)
    return [sorted(items) for items in bins]

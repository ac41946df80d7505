"""Packing of documents into rows of a fixed number of tokens by best fit; long documents span several rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPAN_COLUMNS = ("start", "answer_start", "end", "source", "input_row", "offset")


@dataclass(frozen=True)
class Documents:
    """Documents before packing, concatenated.

    ids: `[tokens]`. The other fields are `[documents]`:
    lengths: in tokens.
    answer_starts: index within the document of the answer's first token.
    sources: index into the source names.
    input_rows: index of the document's row in the input.
    """

    ids: np.ndarray
    lengths: np.ndarray
    answer_starts: np.ndarray
    sources: np.ndarray
    input_rows: np.ndarray


@dataclass(frozen=True)
class PackedRows:
    """Packed rows.

    tokens: `[rows, seq_len]`, padded at the end of each row.
    spans: int64 `[pieces, 6]` in SPAN_COLUMNS' order, row by row. start, answer_start and end are positions in the row;
    offset is the piece's start in its document. A piece without answer tokens has answer_start equal to its end. Padding
    has no span.
    pieces: `[rows]`, the number of spans in each row.
    """

    tokens: np.ndarray
    spans: np.ndarray
    pieces: np.ndarray


def pack(documents: Documents, seq_len: int, pad_token_id: int, dtype: type) -> PackedRows:
    """Pack a group of documents into rows of seq_len tokens; the group's size bounds the memory.

    A document longer than a row fills whole rows, and its remainder is packed like any other piece. Pieces are placed
    longest first, each into the row with the least free space that still holds it. The rows are ordered by their first
    documents, and the pieces within a row by their documents.
    """
    owner, offset, length = _pieces(documents.lengths, seq_len)
    rows = best_fit(length.tolist(), seq_len)
    rows.sort(key=lambda row: row[0])
    pieces = np.array([len(row) for row in rows], dtype=np.int64)
    order = np.array([piece for row in rows for piece in row], dtype=np.int64)
    owner, offset, length = owner[order], offset[order], length[order]
    row_of_piece = np.repeat(np.arange(len(rows)), pieces)
    ends = np.cumsum(length)
    starts = ends - length
    in_row = starts - starts[np.cumsum(pieces) - pieces][row_of_piece]

    tokens = np.full((len(rows), seq_len), pad_token_id, dtype=dtype)
    target = (row_of_piece * seq_len + in_row).tolist()
    source = (np.cumsum(documents.lengths) - documents.lengths)[owner] + offset
    flat = tokens.reshape(-1)
    for to, begin, size in zip(target, source.tolist(), length.tolist(), strict=True):
        flat[to : to + size] = documents.ids[begin : begin + size]

    answer = in_row + np.clip(documents.answer_starts[owner] - offset, 0, length)
    columns = (in_row, answer, in_row + length, documents.sources[owner], documents.input_rows[owner], offset)
    return PackedRows(tokens, np.stack(columns, axis=1).astype(np.int64), pieces)


def _pieces(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most one row; return each piece's document, its offset there and its length."""
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

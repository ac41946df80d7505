"""Documents to rows of a fixed number of tokens: best fit, and longer documents continue in further rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPAN_COLUMNS = ("start", "answer_start", "end", "source", "input_row", "offset")


@dataclass(frozen=True)
class Documents:
    """Documents before packing, one behind another.

    ids: `[tokens]`. lengths, answer_starts (index in the document of the answer's first token), sources (index into the
    source names) and input_rows (which row of the input it was): `[documents]`.
    """

    ids: np.ndarray
    lengths: np.ndarray
    answer_starts: np.ndarray
    sources: np.ndarray
    input_rows: np.ndarray


@dataclass(frozen=True)
class PackedRows:
    """Rows.

    tokens: `[rows, seq_len]`, padded at their ends. spans: int64 `[pieces, 6]` in SPAN_COLUMNS' order, a row's behind
    those of the row before; start, answer_start and end are positions in the row, offset is where the piece begins in
    its document. A piece without a token of the answer has answer_start equal to its end. Padding has no span.
    pieces: `[rows]`, how many spans each row has.
    """

    tokens: np.ndarray
    spans: np.ndarray
    pieces: np.ndarray


def pack(documents: Documents, seq_len: int, pad_token_id: int, dtype: type) -> PackedRows:
    """Pack a group of documents into rows of seq_len tokens; the group bounds the memory that this takes.

    A document longer than a row fills whole rows, and its rest is packed like any other piece. Pieces are placed
    longest first, each into the row with the least room that still holds it. Rows come out in the order of their
    first documents, and so do the documents of a row.
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
    """Cut documents into pieces of a row at most: each piece's document, where it begins in it, and its length."""
    counts = -(-lengths.astype(np.int64) // seq_len)
    owner = np.repeat(np.arange(len(lengths)), counts)
    offset = (np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]) * seq_len
    return owner, offset, np.minimum(seq_len, lengths[owner] - offset)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items of the given lengths over bins, longest first, each into the fullest bin that holds it.

    Returns the indices of each bin's items, ascending. Equal lengths are placed in their order, so the result is
    a function of the lengths alone. Lengths lie between 1 and the capacity.
    """
    bins: list[list[int]] = []
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r is set where a bin with room for r tokens is open: the least room that fits is one shift away
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

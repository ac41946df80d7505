"""Documents to rows of a fixed number of tokens: best fit, and longer documents continue in further rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPAN_COLUMNS = ("start", "answer_start", "end", "source", "input_row", "offset")


@dataclass(frozen=True)
class Document:
    """One document before packing.

    ids: `[tokens]`. answer_start: index in ids of the answer's first token. source: index into the source names.
    input_row: which row of the input it was.
    """

    ids: np.ndarray
    answer_start: int
    source: int
    input_row: int


@dataclass(frozen=True)
class PackedRow:
    """One row.

    tokens: `[seq_len]`, padded at its end. spans: int64 `[pieces, 6]` in SPAN_COLUMNS' order; start, answer_start and
    end are positions in the row, offset is where the piece begins in its document. A piece without a token of the
    answer has answer_start equal to its end. Padding has no span.
    """

    tokens: np.ndarray
    spans: np.ndarray


def pack(documents: Sequence[Document], seq_len: int, pad_token_id: int, dtype: type) -> list[PackedRow]:
    """Packs a group of documents into rows of seq_len tokens; the group bounds the memory that this takes.

    A document longer than a row fills whole rows, and its rest is packed like any other piece. Pieces are placed
    longest first, each into the row with the least room that still holds it. Rows come out in the order of their
    first documents, and so do the documents of a row.
    """
    pieces = [
        (number, offset, min(seq_len, len(document.ids) - offset))
        for number, document in enumerate(documents)
        for offset in range(0, len(document.ids), seq_len)
    ]
    rows = best_fit([length for _, _, length in pieces], seq_len)
    rows.sort(key=lambda row: row[0])
    return [_fill_row([pieces[piece] for piece in row], documents, seq_len, pad_token_id, dtype) for row in rows]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes items of the given lengths over bins, longest first, each into the fullest bin that holds it.

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


def _fill_row(
    pieces: list[tuple[int, int, int]], documents: Sequence[Document], seq_len: int, pad_token_id: int, dtype: type
) -> PackedRow:
    tokens = np.full(seq_len, pad_token_id, dtype=dtype)
    spans = np.empty((len(pieces), len(SPAN_COLUMNS)), dtype=np.int64)
    start = 0
    for index, (number, offset, length) in enumerate(pieces):
        document = documents[number]
        tokens[start : start + length] = document.ids[offset : offset + length]
        answer_start = start + min(max(document.answer_start - offset, 0), length)
        spans[index] = (start, answer_start, start + length, document.source, document.input_row, offset)
        start += length
    return PackedRow(tokens, spans)

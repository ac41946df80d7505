"""Random packed rows of documents as in shards, and batches of them as from the loader."""

from __future__ import annotations

import numpy as np
import torch

from data_pipeline.loading.collate import ARRAYS, collate
from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows

PIECE_TOKENS = 210  # on average, as in webinstruct
SHORTEST_PIECE = 20
PAD = 1


def make_rows(count: int, seq_len: int, vocabulary: int, generator: np.random.Generator) -> PackedRows:
    """Return rows of random tokens in documents of random lengths."""
    tokens = generator.integers(3, vocabulary, (count, seq_len)).astype(np.uint16)
    spans = []
    for row in range(count):
        ends = np.cumsum(generator.integers(SHORTEST_PIECE, 2 * PIECE_TOKENS, seq_len // SHORTEST_PIECE + 1))
        ends = np.append(ends[ends < seq_len], seq_len)
        columns = np.zeros((len(ends), len(SPAN_COLUMNS)), dtype=np.int64)
        columns[1:, 0], columns[:, 2] = ends[:-1], ends
        columns[:, 1] = (columns[:, 0] + ends) // 2
        columns[:, 4] = row
        spans.append(columns)
    return PackedRows(tokens, np.concatenate(spans), np.array([len(columns) for columns in spans]))


def make_batch(rows: int, seq_len: int, vocabulary: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `labels` and `position_ids`, `[rows, seq_len]`, with the loss on all tokens."""
    packed = make_rows(rows, seq_len, vocabulary, np.random.default_rng(seed))
    return dict(zip(ARRAYS, torch.from_numpy(collate(packed, PAD, "all")), strict=True))

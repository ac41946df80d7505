"""Access to a column of texts as a single byte buffer, without creating Python strings."""

from __future__ import annotations

import numpy as np
import polars as pl


def text_buffer(texts: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return a column's UTF-8 bytes, uint8, and the offsets of its texts in them, int64 `[rows + 1]`."""
    if texts.is_empty():
        return np.empty(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    array = texts.to_arrow()
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(array.buffers()[2] or b"", dtype=np.uint8), offsets

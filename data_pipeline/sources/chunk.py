"""A chunk of a source: the range of rows that one process reads at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import polars as pl

from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.layouts import Layout

ROWS_PER_CHUNK = 8192  # exceeded only by a single larger row group
BYTES_PER_CHUNK = 2**23  # of a file of lines


class Chunk(Protocol):
    """A range of rows of a source. The object is small, because it is sent to the process that reads the rows."""

    @property
    def rows(self) -> int | None:
        """The number of rows, or None if it is unknown until they are read."""

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        """Yield frames with the columns prompt, answer and source, as `Layout.turns` makes them, in a fixed order.

        Bad rows are handed to `bad_rows`. If it accepts one, its texts are null.
        Raises DataError if the chunk cannot be read.
        """


def whole_groups(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Put consecutive row groups together to chunks of at most ROWS_PER_CHUNK rows; return (first, groups, rows) of each.

    A larger row group is a chunk of its own.
    """
    chunks, first, rows = [], 0, 0
    for group, size in enumerate(sizes):
        if rows and rows + size > ROWS_PER_CHUNK:
            chunks.append((first, group - first, rows))
            first, rows = group, 0
        rows += size
    return [*chunks, (first, len(sizes) - first, rows)] if rows else chunks

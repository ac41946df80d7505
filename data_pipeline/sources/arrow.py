"""Chunks of Arrow files: the format of `datasets`' caches and of its `save_to_disk`, as a stream or as a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.chunk import whole_groups
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.rows import BYTES_PER_FRAME, ROWS_PER_FRAME, check_columns, columns_of, table_frames

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ArrowChunk:
    """Consecutive record batches of one file."""

    file: Path
    first_batch: int
    batches: int
    rows: int

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        import pyarrow as pa

        name, source = as_text(self.file), as_text(self.file.name)
        with _opened(self.file) as (schema, batches):
            columns = columns_of(layout, schema.names)
            first_row = sum(batch.num_rows for batch in islice(batches, self.first_batch))
            for batch in islice(batches, self.batches):
                table = pa.Table.from_batches([batch]).select(columns)
                rows = max(1, min(ROWS_PER_FRAME, BYTES_PER_FRAME * len(table) // max(1, table.nbytes)))
                for start in range(0, len(table), rows):
                    part = table.slice(start, rows)
                    yield from table_frames(part, name, source, layout, first_row, bad_rows)
                    first_row += len(part)


def arrow_chunks(file: Path, layout: Layout) -> list[ArrowChunk]:
    """Divide a file into chunks of whole record batches.

    Raises DataError if the file is not an Arrow file, or if its columns do not fit the layout.
    """
    with _opened(file) as (schema, batches):
        check_columns(schema, as_text(file), layout)
        sizes = [batch.num_rows for batch in batches]
    return [ArrowChunk(file, *group) for group in whole_groups(sizes)]


def arrow_columns(file: Path) -> list[str]:
    """Return the names of a file's columns."""
    with _opened(file) as (schema, _):
        return schema.names


@contextmanager
def _opened(file: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Provide the schema and the record batches. They stay in the file until their columns are used."""
    import pyarrow as pa

    try:
        with file.open("rb") as opened:
            # Mapped by Python, because pyarrow cannot encode a name that is not UTF-8.
            content = pa.BufferReader(pa.py_buffer(mmap(opened.fileno(), 0, access=ACCESS_READ)))
        is_file = content.read(6) == b"ARROW1"
        content.seek(0)
        reader = pa.ipc.open_file(content) if is_file else pa.ipc.open_stream(content)
        in_order = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else iter(reader)
        yield reader.schema, in_order
    except (pa.ArrowException, OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
        raise DataError(
            f"{as_text(file)} is not a readable Arrow file: download it again or leave it out ({error})"
        ) from error

"""Chunks of parquet files. A chunk is a few whole row groups, so that it is a small unit of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.chunk import whole_groups
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text, for_arrow
from data_pipeline.sources.rows import BYTES_PER_FRAME, ROWS_PER_FRAME, check_columns, columns_of, table_frames

if TYPE_CHECKING:
    import pyarrow.parquet as pq


@dataclass(frozen=True)
class ParquetChunk:
    """Consecutive row groups of one file."""

    file: Path
    first_group: int
    groups: int
    rows: int

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        import pyarrow as pa

        with _open(self.file) as parquet:
            columns = columns_of(layout, parquet.schema_arrow.names)
            first = sum(parquet.metadata.row_group(group).num_rows for group in range(self.first_group))
            for group in range(self.first_group, self.first_group + self.groups):
                rows = _rows_per_frame(parquet.metadata.row_group(group))
                try:
                    for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                        table = pa.Table.from_batches([batch])
                        yield from table_frames(table, layout, as_text(self.file.name), bad_rows, self._place, first)
                        first += len(table)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(
                        f"{as_text(self.file)} is corrupt in row group {group}: download it again or leave it out ({error})"
                    ) from error

    def _place(self, row: int) -> str:
        return f"{as_text(self.file)}, row {row + 1}"


def _rows_per_frame(group: pq.RowGroupMetaData) -> int:
    return max(1, min(ROWS_PER_FRAME, BYTES_PER_FRAME * group.num_rows // max(1, group.total_byte_size)))


def parquet_chunks(file: Path, layout: Layout) -> list[ParquetChunk]:
    """Divide a file into chunks of whole row groups.

    Raises DataError if the file is not a parquet file, or if its columns do not fit the layout.
    """
    with _open(file) as parquet:
        check_columns(parquet.schema_arrow, as_text(file), layout)
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return [ParquetChunk(file, *group) for group in whole_groups(sizes)]


def parquet_columns(file: Path) -> list[str]:
    """Return the names of a file's columns."""
    with _open(file) as parquet:
        return parquet.schema_arrow.names


def _open(file: Path) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(for_arrow(file))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{as_text(file)} is not a readable parquet file: download it again or leave it out ({error})"
        ) from error

"""Chunks of parquet files. A chunk is a few whole row groups, so that it is a small unit of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.rows import BYTES_PER_FRAME, ROWS_PER_FRAME, check_columns, columns_of, text_frame

ROWS_PER_CHUNK = 8192  # exceeded only by a single larger row group


@dataclass(frozen=True)
class ParquetChunk:
    """Consecutive row groups of one file."""

    file: Path
    first_group: int
    groups: int
    rows: int

    def frames(self, layout: Layout) -> Iterator[pl.DataFrame]:
        import pyarrow as pa

        with _open(self.file) as parquet:
            columns = columns_of(layout, parquet.schema_arrow.names)
            first_row = sum(parquet.metadata.row_group(group).num_rows for group in range(self.first_group))
            for group in range(self.first_group, self.first_group + self.groups):
                rows = _rows_per_frame(parquet.metadata.row_group(group))
                try:
                    for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                        batch.validate(full=True)  # parquet readers trust text to be valid UTF-8, and it may not be
                        table = pa.Table.from_batches([batch])
                        yield text_frame(table, str(self.file), self.file.name, layout, first_row)
                        first_row += len(table)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(
                        f"{self.file} is corrupt in row group {group}: download it again or leave it out ({error})"
                    ) from error


def _rows_per_frame(group) -> int:
    return max(1, min(ROWS_PER_FRAME, BYTES_PER_FRAME * group.num_rows // max(1, group.total_byte_size)))


def parquet_chunks(file: Path, layout: Layout) -> list[ParquetChunk]:
    """Divide a file into chunks of whole row groups.

    A row group of more than ROWS_PER_CHUNK rows is a chunk of its own.
    Raises DataError if the file is not a parquet file, or if required columns are missing.
    """
    with _open(file) as parquet:
        check_columns(parquet.schema_arrow, str(file), layout)
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    chunks: list[ParquetChunk] = []
    first, rows = 0, 0
    for group, size in enumerate(sizes):
        if rows and rows + size > ROWS_PER_CHUNK:
            chunks.append(ParquetChunk(file, first, group - first, rows))
            first, rows = group, 0
        rows += size
    if rows:
        chunks.append(ParquetChunk(file, first, len(sizes) - first, rows))
    return chunks


def parquet_columns(file: Path) -> list[str]:
    """Return the names of a file's columns."""
    with _open(file) as parquet:
        return parquet.schema_arrow.names


def _open(file: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is not a readable parquet file: download it again or leave it out ({error})"
        ) from error
    return parquet

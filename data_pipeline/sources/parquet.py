"""Chunks of parquet files. A chunk is a few whole row groups, so that it is a small unit of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.rows import BYTES_PER_FRAME, COLUMNS, ROWS_PER_FRAME, require_columns

ROWS_PER_CHUNK = 8192  # exceeded only by a single larger row group


@dataclass(frozen=True)
class ParquetChunk:
    """Consecutive row groups of one file."""

    file: Path
    first_group: int
    groups: int
    rows: int

    def frames(self) -> Iterator[pl.DataFrame]:
        import pyarrow as pa

        with _open(self.file) as parquet:
            columns = [column for column in COLUMNS if column in parquet.schema_arrow.names]
            for group in range(self.first_group, self.first_group + self.groups):
                rows = _rows_per_frame(parquet.metadata.row_group(group))
                try:
                    for batch in parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                        batch.validate(full=True)  # parquet readers trust text to be valid UTF-8, and it may not be
                        yield _text_frame(pl.from_arrow(pa.Table.from_batches([batch])), self.file)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(
                        f"{self.file} is corrupt in row group {group}: download it again or leave it out ({error})"
                    ) from error


def _rows_per_frame(group) -> int:
    return max(1, min(ROWS_PER_FRAME, BYTES_PER_FRAME * group.num_rows // max(1, group.total_byte_size)))


def parquet_chunks(file: Path) -> list[ParquetChunk]:
    """Divide a file into chunks of whole row groups.

    A row group of more than ROWS_PER_CHUNK rows is a chunk of its own.
    Raises DataError if the file is not a parquet file, or if required columns are missing.
    """
    with _open(file) as parquet:
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


def _open(file: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is not a readable parquet file: download it again or leave it out ({error})"
        ) from error
    names = parquet.schema_arrow.names
    require_columns(names, str(file))
    if twice := [column for column in COLUMNS if names.count(column) > 1]:
        raise DataError(f"{file} has more than one column named {twice[0]}: rename the others")
    for column in COLUMNS:
        if column in parquet.schema_arrow.names:
            kind = parquet.schema_arrow.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            known = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
            if not any(is_known(kind) for is_known in known):
                raise DataError(f"the column {column} of {file} holds {kind}, not text: convert it to strings")
    return parquet


def _text_frame(frame: pl.DataFrame, file: Path) -> pl.DataFrame:
    if "source" not in frame.columns:
        frame = frame.with_columns(source=pl.lit(file.name))
    return frame.select(pl.col(column).cast(pl.String).fill_null("") for column in COLUMNS)

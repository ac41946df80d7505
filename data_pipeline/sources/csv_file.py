"""Rows of files of comma-separated or tab-separated values. A file is one chunk: a quoted value may span lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRowError, BadRows
from data_pipeline.sources.compression import READ_FAULTS, open_bytes
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.rows import BYTES_PER_FRAME, bad_frame, check_columns, columns_of, table_frames


@dataclass(frozen=True)
class CsvChunk:
    """All rows of a file. All values are read as text."""

    file: Path
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        import pyarrow as pa
        import pyarrow.csv

        found: list[BadRowError] = []

        def refuse(row) -> str:
            fault = f"it has {row.actual_columns} values, but there are {row.expected_columns} columns"
            found.append(BadRowError("another number of values than columns", f"{fault} ({row.text[:80]})"))
            return "skip"

        name, source, first_row = as_text(self.file), as_text(self.file.name), 0
        columns = columns_of(layout, csv_columns(self.file) or [])
        try:
            with open_bytes(self.file) as content:
                reader = pa.csv.open_csv(
                    content,
                    read_options=pa.csv.ReadOptions(use_threads=False, block_size=BYTES_PER_FRAME),
                    parse_options=pa.csv.ParseOptions(
                        delimiter=_delimiter(self.file), newlines_in_values=True, invalid_row_handler=refuse
                    ),
                    convert_options=pa.csv.ConvertOptions(
                        column_types=dict.fromkeys(columns, pa.string()),
                        include_columns=columns,
                        strings_can_be_null=False,
                    ),
                )
                for batch in reader:
                    table = pa.Table.from_batches([batch])
                    yield from table_frames(table, name, source, layout, first_row, bad_rows)
                    first_row += len(table)
                    yield from _skipped(found, name, source, layout, first_row, bad_rows)
                    found.clear()
                yield from _skipped(found, name, source, layout, first_row, bad_rows)
        except (pa.ArrowException, *READ_FAULTS) as error:
            raise DataError(
                f"{name} cannot be read after row {first_row}: correct it or leave it out ({error})"
            ) from error


def _skipped(
    found: list[BadRowError], name: str, source: str, layout: Layout, first_row: int, bad_rows: BadRows
) -> Iterator[pl.DataFrame]:
    """Stand in for the rows that the parser left out, near the place where they were."""
    for error in found:
        bad_rows.add(error, lambda: f"{name}, a row before row {first_row}")
        yield bad_frame(layout, source)


def csv_chunks(file: Path, layout: Layout) -> list[CsvChunk]:
    """Return the file as one chunk. Raises DataError if its columns do not fit the layout."""
    import pyarrow as pa

    columns = csv_columns(file)
    if columns is None:
        return []
    check_columns(pa.schema([(column, pa.string()) for column in columns]), as_text(file), layout)
    return [CsvChunk(file)]


def csv_columns(file: Path) -> list[str] | None:
    """Return the names in a file's first line, or None if it is empty."""
    try:
        with open_bytes(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as lines:
            return next(csv.reader(lines, delimiter=_delimiter(file)), None)
    except (*READ_FAULTS, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{as_text(file)} has no readable first line: save it as UTF-8 text ({error})") from error


def _delimiter(file: Path) -> str:
    return "\t" if ".tsv" in [suffix.lower() for suffix in file.suffixes[-2:]] else ","

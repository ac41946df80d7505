"""Chunks of comma- and tab-separated files with a header. A chunk is a range of bytes that consists of whole records."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources import chunk
from data_pipeline.sources.bad_rows import BadRowError, BadRows
from data_pipeline.sources.compression import READ_FAULTS, is_compressed, open_bytes
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.records import last_record_end, whole_records
from data_pipeline.sources.rows import ROWS_PER_FRAME, bad_frame, check_columns, columns_of, table_frames

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.csv as pc

HEADER_BYTES = 2**20
PARSED_BYTES = 2**20  # what fits into a processor's cache is parsed faster
EXCERPT = 60  # characters of a bad row in a message


@dataclass(frozen=True)
class DelimitedChunk:
    """The records of the bytes from `start` up to `end` (excluded) of a file; of a compressed file, all.

    header: the number of bytes of the header, decompressed.
    """

    file: Path
    start: int
    end: int | None
    header: int
    names: tuple[str, ...]
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        first, used, source = 0, columns_of(layout, self.names), as_text(self.file.name)
        for block in self._blocks():
            table, invalid = self._table(block, used)
            taken = 0  # rows of the table; those with a wrong number of values are not in it
            for number, row in enumerate([*invalid, None]):
                end = table.num_rows if row is None else row.number - 1 - number
                for start in range(taken, end, ROWS_PER_FRAME):
                    part = table.slice(start, min(ROWS_PER_FRAME, end - start))
                    yield from table_frames(part, layout, source, bad_rows, self._place, first + start + number)
                taken = end
                if row is not None:
                    bad_rows.add(_fault(row), partial(self._place, first + end + number))
                    yield bad_frame(layout, source)
            first += table.num_rows + len(invalid)

    def _blocks(self) -> Iterator[memoryview]:
        try:
            with closing(open_bytes(self.file, self.start, self.end)) as content:
                if is_compressed(self.file):
                    content.read(self.header)
                yield from whole_records(content, self.file, _delimiter(self.file), PARSED_BYTES)
        except READ_FAULTS as error:
            raise DataError(
                f"{as_text(self.file)} cannot be read: download it again or leave it out ({error})"
            ) from error

    def _table(self, block: memoryview, used: list[str]) -> tuple[pa.Table, list[pc.InvalidRow]]:
        """Parse whole records. Return the used columns as text, and the rows with a wrong number of values."""
        invalid: list[pc.InvalidRow] = []
        return _parse(block, self.file, self.names, used, invalid), invalid

    def _place(self, position: int) -> str:
        """Name a row by its number in the file; only for an error, because everything before it is read."""
        before = 0
        if self.start > self.header:
            for start, end in _ranges(self.file, self.header, self.start):
                part = DelimitedChunk(self.file, start, end, self.header, self.names)
                tables = (part._table(block, list(self.names[:1])) for block in part._blocks())
                before += sum(table.num_rows + len(invalid) for table, invalid in tables)
        return f"{as_text(self.file)}, row {before + position + 1}"


def delimited_chunks(file: Path, layout: Layout) -> list[DelimitedChunk]:
    """Divide a file between records; a compressed file is one chunk.

    A large file is read once to find where its quoted values are: a line feed in one of them ends no record.
    Raises DataError if required columns are missing, or if a quoted value has no end.
    """
    import pyarrow as pa

    if (found := _header(file)) is None:
        return []
    header, names = found
    check_columns(pa.schema([(name, pa.string()) for name in names]), as_text(file), layout)
    if is_compressed(file):
        return [DelimitedChunk(file, 0, None, header, names)]
    return [
        DelimitedChunk(file, start, end, header, names) for start, end in _ranges(file, header, file.stat().st_size)
    ]


def delimited_columns(file: Path) -> list[str] | None:
    """Return the names of a file's columns, or None if the file is empty."""
    found = _header(file)
    return None if found is None else list(found[1])


def _header(file: Path) -> tuple[int, tuple[str, ...]] | None:
    """Return the bytes of the header, decompressed, and the names in it; None if the file is empty."""
    try:
        with closing(open_bytes(file)) as content:
            head = content.read(HEADER_BYTES)
    except READ_FAULTS as error:
        raise DataError(f"{as_text(file)} cannot be read: download it again or leave it out ({error})") from error
    if not head:
        return None
    size = _header_end(head, _delimiter(file))
    text = head[:size].decode(errors="replace").removeprefix("\ufeff")
    return size, tuple(next(csv.reader([text], delimiter=_delimiter(file).decode()), []))


def _ranges(file: Path, start: int, end: int) -> Iterator[tuple[int, int]]:
    if start < end <= start + chunk.BYTES_PER_CHUNK:
        yield start, end
        return
    with closing(open_bytes(file, start, end)) as content:
        for block in whole_records(content, file, _delimiter(file), chunk.BYTES_PER_CHUNK):
            yield start, start + len(block)
            start += len(block)


def _header_end(head: bytes, delimiter: bytes) -> int:
    """Return where the header ends, which is the first record; its names may hold line feeds."""
    end = 0
    while (end := head.find(b"\n", end) + 1) > 0:
        if last_record_end(head[:end], delimiter) == end:
            return end
    return len(head)


def _delimiter(file: Path) -> bytes:
    name = file.with_suffix("") if is_compressed(file) else file
    return b"\t" if name.suffix.lower() == ".tsv" else b","


def _parse(block: memoryview, file: Path, names: Sequence[str], used: list[str], invalid: list) -> pa.Table:
    """Parse records as columns of text, and put the rows with a wrong number of values into `invalid`."""
    import pyarrow as pa
    import pyarrow.csv as pc

    def skip(row: pc.InvalidRow) -> str:
        invalid.append(row)
        return "skip"

    try:
        return pc.read_csv(
            pa.py_buffer(block),
            pc.ReadOptions(
                use_threads=False, block_size=len(block) + 1, column_names=names
            ),  # so that rows are numbered
            pc.ParseOptions(delimiter=_delimiter(file).decode(), newlines_in_values=True, invalid_row_handler=skip),
            pc.ConvertOptions(
                check_utf8=False,
                column_types=dict.fromkeys(used, pa.string()),
                include_columns=used,
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{as_text(file)} is not a readable table: correct it or leave it out ({str(error)[:200]})"
        ) from error


def _fault(row: pc.InvalidRow) -> BadRowError:
    text = row.text if len(row.text) <= EXCERPT else f"{row.text[:EXCERPT]}…"
    reason = f"{row.actual_columns} instead of {row.expected_columns} values"
    return BadRowError(reason, f"it has {reason} ({text!r})")

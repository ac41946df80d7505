"""Chunks of Arrow files, streams (`datasets` writes these) and folders that `save_to_disk` made. A chunk is a range of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources import chunk
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text, for_arrow
from data_pipeline.sources.rows import BYTES_PER_FRAME, ROWS_PER_FRAME, check_columns, table_frames
from data_pipeline.sources.values import column_of

if TYPE_CHECKING:
    import pyarrow as pa

FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one record batch: its number, where it begins in a stream, and the first row."""

    batch: int
    position: int
    first: int
    rows: int


@dataclass(frozen=True)
class ArrowChunk:
    """Rows of consecutive record batches. first_row: the number of the first row in the file."""

    file: Path
    parts: tuple[Part, ...]
    first_row: int

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        import pyarrow as pa

        first = 0
        for part in self.parts:
            written = self.file.stat().st_mtime_ns
            batch = _batch(self.file, part.batch, part.position, (*layout.fields, layout.source), written)
            rows = pa.Table.from_batches([batch.slice(part.first, part.rows)])
            step = max(1, min(ROWS_PER_FRAME, BYTES_PER_FRAME * part.rows // max(1, rows.nbytes)))
            for start in range(0, part.rows, step):
                piece = rows.slice(start, step)
                source = as_text(self.file.name)
                yield from table_frames(piece, layout, source, bad_rows, self._place, first + start)
            first += part.rows

    def _place(self, position: int) -> str:
        return f"{as_text(self.file)}, row {self.first_row + position + 1}"


def arrow_columns(file: Path) -> list[str] | None:
    """Return the names of a file's columns, or None if the file is empty."""
    import pyarrow as pa

    if file.stat().st_size == 0:
        return None
    with _readable(file), closing(_opened(file)) as content:
        reader = pa.ipc.open_file(content) if _is_file(file) else pa.ipc.open_stream(content)
        return reader.schema.names


def arrow_chunks(file: Path, layout: Layout) -> list[ArrowChunk]:
    """Divide a file into ranges of rows.

    Raises DataError if the file is no Arrow file or stream, or if required columns are missing.
    """
    chunks: list[ArrowChunk] = []
    parts: list[Part] = []
    rows = done = 0
    for number, (position, size) in enumerate(_batches(file, layout)):
        for first in range(0, size, chunk.ROWS_PER_CHUNK):
            part = Part(number, position, first, min(chunk.ROWS_PER_CHUNK, size - first))
            if parts and rows + part.rows > chunk.ROWS_PER_CHUNK:
                chunks.append(ArrowChunk(file, tuple(parts), done))
                parts, rows, done = [], 0, done + rows
            parts.append(part)
            rows += part.rows
    return [*chunks, ArrowChunk(file, tuple(parts), done)] if parts else chunks


def _batches(file: Path, layout: Layout) -> list[tuple[int, int]]:
    """Return the position and the number of rows of each batch. The rows themselves are not read from disk."""
    import pyarrow as pa

    if file.stat().st_size == 0:
        return []  # and cannot be mapped into memory
    with _readable(file), _mapped(file) as content:
        if _is_file(file):
            reader = pa.ipc.open_file(content)
            check_columns(reader.schema, as_text(file), layout)
            return [(0, reader.get_batch(number).num_rows) for number in range(reader.num_record_batches)]
        reader = pa.ipc.open_stream(content)
        check_columns(reader.schema, as_text(file), layout)
        found = []
        while True:
            position = content.tell()
            try:
                found.append((position, reader.read_next_batch().num_rows))
            except StopIteration:
                return found


@lru_cache(maxsize=1)  # chunks of one large batch mostly follow each other
def _batch(file: Path, number: int, position: int, fields: tuple[str, ...], written_ns: int) -> pa.RecordBatch:
    """Read the used columns of a batch. It is copied: a mapped file that shrinks would kill the process."""
    import pyarrow as pa

    with _readable(file):
        content, reader, schema = _reader(file, fields, written_ns)
        if reader is not None:
            return reader.get_batch(number)
        if _has_dictionary(schema):  # its values are somewhere before the batch
            content.seek(0)
            stream = pa.ipc.open_stream(content, options=_used_fields(schema, fields))
            return next(batch for at, batch in enumerate(stream) if at == number)
        content.seek(position)
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(content), schema)
        return batch.select(_used(schema, fields))


@lru_cache(maxsize=1)
def _reader(
    file: Path, fields: tuple[str, ...], written_ns: int
) -> tuple[pa.NativeFile, pa.RecordBatchFileReader | None, pa.Schema]:
    """Open a file for its batches: the content, its reader if it is not a stream, and its columns."""
    import pyarrow as pa

    content = _opened(file)
    if _is_file(file):
        schema = pa.ipc.open_file(content).schema
        return content, pa.ipc.open_file(content, options=_used_fields(schema, fields)), schema
    return content, None, pa.ipc.open_stream(content).schema


def _has_dictionary(schema: pa.Schema) -> bool:
    """Tell whether a column, or a value within one, is stored by number."""
    return "dictionary<" in schema.to_string(show_schema_metadata=False, show_field_metadata=False)


def _used(schema: pa.Schema, fields: tuple[str, ...]) -> list[str]:
    columns = {column_of(field, schema.names) for field in fields}
    return [name for name in schema.names if name in columns]


def _used_fields(schema: pa.Schema, fields: tuple[str, ...]) -> pa.ipc.IpcReadOptions:
    import pyarrow as pa

    used = _used(schema, fields)
    return pa.ipc.IpcReadOptions(included_fields=[number for number, name in enumerate(schema.names) if name in used])


def _is_file(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(len(FILE_MAGIC)) == FILE_MAGIC


def _opened(file: Path) -> pa.NativeFile:
    import pyarrow as pa

    source = for_arrow(file)
    return pa.OSFile(source) if isinstance(source, str) else pa.PythonFile(source, "r")


@contextmanager
def _mapped(file: Path) -> Iterator[pa.NativeFile]:
    import pyarrow as pa

    source = for_arrow(file)
    with pa.memory_map(source) if isinstance(source, str) else pa.PythonFile(source, "r") as content:
        yield content


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{as_text(file)} is not a readable Arrow file or stream: download it again or leave it out ({str(error)[:200]})"
        ) from error

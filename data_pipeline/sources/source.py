"""Sources of rows: the built-in sample, parquet and jsonl files, or a dataset on the hub.

A source is a list of chunks. A chunk is a range of rows and the unit of work. Only the source and the constants in these
modules determine the chunks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.jsonl import jsonl_chunks, jsonl_columns
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.origin import origin_of
from data_pipeline.sources.parquet import parquet_chunks, parquet_columns
from data_pipeline.sources.rows import frames, values_of

FILE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
BLOCK_BYTES, BLOCKS = 2**16, 64
BY_COLUMNS = LayoutChoice()
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Chunk(Protocol):
    """A range of rows of a source. The object is small, because it is sent to the process that reads the rows.

    rows: the number of rows, or None if it is unknown until they are read.
    """

    rows: int | None

    def frames(self, layout: Layout) -> Iterator[pl.DataFrame]:
        """Yield frames with the columns prompt, answer and source, as `Layout.turns` makes them, in a fixed order.

        Raises DataError for a bad row, and if the chunk cannot be read.
        """


@dataclass(frozen=True)
class FileState:
    """The size of a file and the time when it was last written."""

    file: Path
    size: int
    written_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Return the current state of a file."""
        stat = file.stat()
        return cls(file, stat.st_size, stat.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raise DataError if the file was written, replaced or removed since."""
        try:
            now = FileState.of(self.file)
        except OSError as error:
            raise DataError(
                f"{self.file} was removed while it was read: put it back and run again ({error})"
            ) from error
        if now != self:
            raise DataError(
                f"{self.file} changed while it was read ({self.size:,} bytes before, {now.size:,} now): wait until nothing "
                "writes to it, delete the unfinished output folder, and run again"
            )


@dataclass(frozen=True)
class FileChunk:
    """A chunk of a file. Reading it fails if the file has changed since the source was opened."""

    chunk: Chunk
    state: FileState

    @property
    def rows(self) -> int | None:
        return self.chunk.rows

    def frames(self, layout: Layout) -> Iterator[pl.DataFrame]:
        try:
            yield from self.chunk.frames(layout)
        except DataError:
            self.state.check_unchanged()  # a changed file is the likelier cause
            raise
        self.state.check_unchanged()


@dataclass(frozen=True)
class Source:
    """The chunks of an input, in order.

    name: shown to the user.
    identity: JSON values that distinguish this input from others; it contains no paths, so it is the same on every machine.
    layout: how columns become texts.
    files: the files of the source; empty if it does not consist of files.
    """

    name: str
    identity: list[dict]
    chunks: tuple[Chunk, ...]
    layout: Layout
    files: tuple[FileState, ...] = ()

    @property
    def num_rows(self) -> int | None:
        """The number of rows, or None if it is unknown until they are read."""
        rows = [chunk.rows for chunk in self.chunks]
        return None if None in rows else sum(rows)

    def check_unchanged(self) -> None:
        """Raise DataError if one of the files has changed since the source was opened."""
        for state in self.files:
            state.check_unchanged()

    def frames(self) -> Iterator[pl.DataFrame]:
        """Yield the frames of all chunks."""
        for chunk in self.chunks:
            yield from chunk.frames(self.layout)


def open_source(source: str | list[str], choice: LayoutChoice = BY_COLUMNS) -> Source:
    """Open `sample`, parquet or jsonl files (paths, folders, globs), or a dataset on the hub by its name.

    choice: what is said about the layout; the columns tell the rest.
    Raises DataError if the source is none of these, or if its columns fit no layout.
    """
    parts = [source] if isinstance(source, str) else list(source)
    if parts == ["sample"]:
        return sample_source(choice)
    if len(parts) == 1 and not _is_local(parts[0]) and HUB_NAME.fullmatch(parts[0]):
        from data_pipeline.sources.hub import hub_chunks

        identity, chunks, layout = hub_chunks(parts[0], choice)
        return Source(parts[0], [identity], chunks, layout)
    return file_source(parts, choice)


def file_source(parts: list[str], choice: LayoutChoice = BY_COLUMNS) -> Source:
    """Open parquet and jsonl files as one source, in sorted order; every chunk lies within one file."""
    files = sorted({file.resolve(): file for part in parts for file in _files_of(part)}.values())
    if not files:
        raise DataError("no source is given: name files, a folder, a hub dataset, or `sample`")
    states = [FileState.of(file) for file in files]
    first, last = files[0].name, files[-1].name
    identity = [
        {"name": file.name, "bytes": file.stat().st_size, "sample": _digest(file), **origin_of(file)} for file in files
    ]
    layout = _layout_of(files, choice)
    chunks = []
    for file, state in zip(files, states, strict=True):
        of_file = parquet_chunks(file, layout) if _is_parquet(file) else jsonl_chunks(file)
        chunks += [FileChunk(chunk, state) for chunk in of_file]
    return Source(first if len(files) == 1 else f"{first} … {last}", identity, tuple(chunks), layout, tuple(states))


def _layout_of(files: list[Path], choice: LayoutChoice) -> Layout:
    """Find the layout of the first file that has columns; the other files have to fit it."""
    for file in files:
        columns = parquet_columns(file) if _is_parquet(file) else jsonl_columns(file)
        if columns is not None:
            return choice.resolve(columns, str(file))
    raise DataError(f"{files[0]} and all other files of the source have no rows: check them")


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _digest(file: Path) -> str:
    """Hash blocks spread over a file, to notice edits without reading gigabytes. Up to 4 MiB, everything is hashed."""
    digest, size = hashlib.sha256(), file.stat().st_size
    step = max(BLOCK_BYTES, size // BLOCKS)
    with file.open("rb") as content:
        for start in [*range(0, size, step), max(0, size - BLOCK_BYTES)]:
            content.seek(start)
            digest.update(content.read(BLOCK_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class SampleChunk:
    """The whole built-in sample."""

    rows: int

    def frames(self, layout: Layout) -> Iterator[pl.DataFrame]:
        yield from frames((values_of(row, "the sample,", "sample", layout) for row in _sample_rows()), layout)


def sample_source(choice: LayoutChoice = BY_COLUMNS) -> Source:
    """Open the built-in sample corpus."""
    rows = _sample_rows()
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Source(
        "sample",
        [{"name": "sample", "rows": len(rows), "sha256": digest}],
        (SampleChunk(len(rows)),),
        choice.resolve(list(rows[0]), "the sample"),
    )


@lru_cache(maxsize=1)
def _sample_rows() -> list[dict[str, str]]:
    from data_pipeline.sources.sample import training_rows

    return list(training_rows())


def _is_local(part: str) -> bool:
    looks_like_path = glob.has_magic(part) or part.startswith((".", "/", "~")) or part.endswith(FILE_SUFFIXES)
    return looks_like_path or Path(part).exists()


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, following linked folders. Visit each folder once, because links can form loops."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent, name) for name in names)


def _files_of(part: str) -> list[Path]:
    """List the files that a path, folder or glob stands for. Raises DataError if there are none."""
    path = Path(part).expanduser()
    if path.is_dir():
        found = [file for file in _files_below(path) if file.is_file()]
    elif path.exists():
        if not path.name.lower().endswith(FILE_SUFFIXES):
            raise DataError(f"{part} is of an unknown kind: give {', '.join(FILE_SUFFIXES)} files")
        return [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    files = [file for file in found if file.name.lower().endswith(FILE_SUFFIXES)]
    if not files:
        fault = "contains" if path.is_dir() else "does not exist, or matches"
        raise DataError(f"the source {part} {fault} no {', '.join(FILE_SUFFIXES)} file: check the path")
    return files

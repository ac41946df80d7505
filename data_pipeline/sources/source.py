"""Sources of rows: the built-in sample, files, or a dataset on the hub.

A source is a list of chunks. A chunk is a range of rows and the unit of work. Only the source and the constants in these
modules determine the chunks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows, NoGoodRowError
from data_pipeline.sources.chunk import Chunk
from data_pipeline.sources.compression import is_compressed
from data_pipeline.sources.file_names import shown
from data_pipeline.sources.files import FileChoice, find_files
from data_pipeline.sources.formats import format_of
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.origin import origin_of
from data_pipeline.sources.rows import frames

BLOCK_BYTES, BLOCKS = 2**16, 64
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TRAIN, BY_COLUMNS = FileChoice(), LayoutChoice()


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
                f"{shown(self.file)} was removed while it was read: put it back and run again ({error})"
            ) from error
        if now != self:
            raise DataError(
                f"{shown(self.file)} changed while it was read ({self.size:,} bytes before, {now.size:,} now): wait until "
                "nothing writes to it, delete the unfinished output folder, and run again"
            )


@dataclass(frozen=True)
class FileChunk:
    """A chunk of a file. Reading it fails if the file has changed since the source was opened."""

    chunk: Chunk
    state: FileState

    @property
    def rows(self) -> int | None:
        return self.chunk.rows

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        try:
            yield from self.chunk.frames(layout, bad_rows)
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
    report: lines that say which files are read and which are left out.
    """

    name: str
    identity: list[dict]
    chunks: tuple[Chunk, ...]
    layout: Layout
    files: tuple[FileState, ...] = ()
    report: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int | None:
        """The number of rows, or None if it is unknown until they are read."""
        rows = [chunk.rows for chunk in self.chunks if chunk.rows is not None]
        return sum(rows) if len(rows) == len(self.chunks) else None

    def check_unchanged(self) -> None:
        """Raise DataError if one of the files has changed since the source was opened."""
        for state in self.files:
            state.check_unchanged()

    def frames(self, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        """Yield the frames of all chunks."""
        for chunk in self.chunks:
            yield from chunk.frames(self.layout, bad_rows)


def open_source(source: str | list[str], layout: LayoutChoice = BY_COLUMNS, files: FileChoice = TRAIN) -> Source:
    """Open `sample`, files (paths, folders, patterns), or a dataset on the hub by its name.

    layout: what is said about the layout; the columns tell the rest. files: which files of folders are read.
    Raises DataError if the source is none of these, or if its columns fit no layout.
    """
    parts = [source] if isinstance(source, str) else list(source)
    if parts == ["sample"]:
        return sample_source(layout)
    if len(parts) == 1 and not _is_local(parts[0]) and HUB_NAME.fullmatch(parts[0]):
        from data_pipeline.sources.hub import hub_chunks

        identity, chunks, its_layout = hub_chunks(parts[0], layout, files.split)
        return Source(parts[0], [identity], chunks, its_layout)
    return file_source(parts, layout, files)


def file_source(parts: list[str], layout: LayoutChoice = BY_COLUMNS, choice: FileChoice = TRAIN) -> Source:
    """Open files as one source, in sorted order; every chunk lies within one file."""
    found = find_files(parts, choice)
    files = found.taken
    if not files:
        raise DataError("no source is given: name files, a folder, a hub dataset, or `sample`")
    states = [FileState.of(file) for file in files]
    identity = [
        {"name": shown(file.name), "bytes": file.stat().st_size, "sample": _digest(file), **origin_of(file)}
        for file in files
    ]
    its_layout = _layout_of(files, layout)
    chunks: list[Chunk] = []
    for file, state in zip(files, states, strict=True):
        kind = format_of(file)
        assert kind is not None  # find_files has refused other files
        chunks += [FileChunk(chunk, state) for chunk in kind.chunks(file, its_layout)]
    first, last = shown(files[0].name), shown(files[-1].name)
    name = first if len(files) == 1 else f"{first} … {last}"
    return Source(name, identity, tuple(chunks), its_layout, tuple(states), (*found.report(), *_notes(files)))


def _notes(files: list[Path]) -> list[str]:
    """Say which files only one process can read."""
    kinds = [(file, format_of(file)) for file in files]
    whole = [file for file, kind in kinds if kind is not None and (is_compressed(file) or not kind.is_divided)]
    if not whole:
        return []
    more = f" and {len(whole) - 1:,} more" if len(whole) > 1 else ""
    return [f"{shown(whole[0])}{more} cannot be divided: one process reads a whole file"]


def _layout_of(files: list[Path], choice: LayoutChoice) -> Layout:
    """Find the layout of the first file that has columns; the other files have to fit it."""
    fault = DataError(f"{shown(files[0])} and all other files of the source have no rows: check them")
    for file in files:
        kind = format_of(file)
        assert kind is not None  # find_files has refused other files
        try:
            columns = kind.columns(file)
        except NoGoodRowError as error:
            fault = error
            continue
        if columns is not None:
            return choice.resolve(columns, shown(file))
    raise fault


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

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        yield from frames(((row, lambda: "the sample") for row in _sample_rows()), layout, "sample", bad_rows)


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
    looks_like_path = glob.has_magic(part) or part.startswith((".", "/", "~")) or format_of(Path(part)) is not None
    return looks_like_path or Path(part).exists()

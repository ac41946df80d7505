"""Sources of rows: the built-in sample, files, or a dataset on the hub.

A source is a list of chunks. A chunk is a range of rows and the unit of work. Only the source and the constants in these
modules determine the chunks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows, NoGoodRowError
from data_pipeline.sources.chunk import BYTES_PER_CHUNK, Chunk
from data_pipeline.sources.file_state import FileChunk, FileState
from data_pipeline.sources.files import FileChoice, find_files, is_pattern, several
from data_pipeline.sources.formats import Format, format_of
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.origin import origin_of
from data_pipeline.sources.rows import frames

LARGE_FILE = 2 * BYTES_PER_CHUNK  # a file from which it matters that several workers read it
BLOCK_BYTES, BLOCKS = 2**16, 64
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TRAIN, BY_COLUMNS = FileChoice(), LayoutChoice()


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
    states = [FileState.of(file) for file in found.taken]
    names = [as_text(file.name) for file in found.taken]
    identity = [
        {"name": name, "bytes": state.size, "sample": _digest(state.file), **origin_of(state.file)}
        for name, state in zip(names, states, strict=True)
    ]
    its_layout = _layout_of(found.taken, layout)
    by_file = [_format_of(file).chunks(file, its_layout) for file in found.taken]
    chunks = tuple(FileChunk(chunk, state) for state, of_file in zip(states, by_file, strict=True) for chunk in of_file)
    whole = [
        name
        for name, state, of_file in zip(names, states, by_file, strict=True)
        if len(of_file) == 1 and state.size > LARGE_FILE
    ]
    name = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    report = found.lines()
    if whole:
        report.append(
            f"cannot be divided between workers: {several(whole)} (JSON lines can be, also if pzstd or bgzip compressed them)"
        )
    return Source(name, identity, chunks, its_layout, tuple(states), tuple(report))


def _format_of(file: Path) -> Format:
    kind = format_of(file)
    assert kind is not None  # find_files has refused other files
    return kind


def _layout_of(files: Sequence[Path], choice: LayoutChoice) -> Layout:
    """Find the layout of the first file that has columns; the other files have to fit it."""
    fault = DataError(f"{as_text(files[0])} and all other files of the source have no rows: check them")
    for file in files:
        try:
            columns = _format_of(file).columns(file)
        except NoGoodRowError as error:
            fault = error
            continue
        if columns is not None:
            return choice.resolve(columns, as_text(file))
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
    looks_like_path = is_pattern(part) or part.startswith((".", "/", "~")) or format_of(PurePath(part)) is not None
    return looks_like_path or os.path.lexists(part)

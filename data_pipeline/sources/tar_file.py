"""Rows of WebDataset tars of text: consecutive members with the same key are one row."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRowError, BadRows, columns_of_rows
from data_pipeline.sources.json_rows import parse_row
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.rows import Row, frames


@dataclass(frozen=True)
class TarChunk:
    """All rows of a tar."""

    file: Path
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        yield from frames(_rows(self.file), layout, as_text(self.file.name), bad_rows)


def tar_chunks(file: Path, layout: Layout) -> list[TarChunk]:
    """Return the tar as one chunk."""
    return [TarChunk(file)]


def tar_columns(file: Path) -> list[str] | None:
    """Return the columns of a tar's first good row, or None if it has no row."""
    return columns_of_rows(_rows(file))


def _rows(file: Path) -> Iterator[Row]:
    """Yield every row: the keys of a `.json` member, the text of `.txt` as `text`, that of others under their extension."""
    name = as_text(file)
    try:
        with tarfile.open(file, "r:") as tar:
            for key, members in groupby((member for member in tar if member.isfile()), key=_key):
                row: dict | BadRowError = {}
                for member in members:
                    content = tar.extractfile(member)
                    assert content is not None  # it is a regular file
                    found = _columns(_extension(member), content.read())
                    row = found if isinstance(found, BadRowError) or isinstance(row, BadRowError) else row | found
                yield row, partial("{}, key {}".format, name, key)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{name} is not a readable tar: download it again or leave it out ({error})") from error


def _columns(extension: str, content: bytes) -> dict | BadRowError:
    if extension == "json":
        return parse_row(content, [])
    try:
        return {"text" if extension == "txt" else extension: content.decode()}
    except UnicodeDecodeError:
        return BadRowError(f"the member .{extension} is not text", f"its member .{extension} is not UTF-8 text")


def _key(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.split(".")[0] or path.name))


def _extension(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).name.partition(".")[2].lower()

"""Chunks of WebDataset tars of text: members whose names differ only after the first dot are one row.

`KEY.json` holds columns, `KEY.NAME.txt` the column NAME, and `KEY.txt` the column `text`. Other members are no columns.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources import chunk
from data_pipeline.sources.bad_rows import BadRowError, BadRows, columns_of_rows
from data_pipeline.sources.json_rows import parse_row
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.rows import Row, frames

BLOCK = 512
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
Sample = tuple[str, list[tuple[str, bytes]]]
Member = tuple[str, int, int]


@dataclass(frozen=True)
class TarChunk:
    """The samples from byte `start` to before byte `end`."""

    file: Path
    start: int
    end: int
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        yield from frames(self.parsed(), layout, as_text(self.file.name), bad_rows)

    def parsed(self) -> Iterator[Row]:
        """Yield every row, or why it cannot be read, and its name."""
        for key, members in self._samples():
            yield _row(members), partial("{}, sample {}".format, as_text(self.file), key)

    def _samples(self) -> Iterator[Sample]:
        try:
            with self.file.open("rb") as content:
                content.seek(self.start)
                data = content.read(self.end - self.start)
            members = _plain_members(data)
            if members is None:
                members = _members(data)
        except (OSError, tarfile.TarError) as error:
            raise _unreadable(self.file, error) from error
        named = ((found, start, size) for name, start, size in members if (found := NAME.fullmatch(name)))
        for key, group in groupby(named, key=lambda member: member[0][1]):
            yield as_text(key), [(found[2].lower(), data[start : start + size]) for found, start, size in group]


def _members(data: bytes) -> list[Member]:
    """Return the name of each file in a part of a tar, where its data begins, and their size."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]


def _plain_members(data: bytes) -> list[Member] | None:
    """Do the same several times as fast if the headers say all; return None if names or sizes are elsewhere."""
    members, position = [], 0
    while position < len(data):
        header = data[position : position + BLOCK]
        kind, digits = header[156:157], header[124:136].rstrip(b" \0")
        if not digits.isdigit():
            return None
        start, size = position + BLOCK, int(digits, 8)
        if kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            name, prefix = (header[part].partition(b"\0")[0] for part in (slice(0, 100), slice(345, 500)))
            if header[257:263] == b"ustar\0" and prefix:
                name = prefix + b"/" + name
            members.append((name.decode("utf-8", "surrogateescape"), start, size))
        elif kind == tarfile.XHDTYPE:
            # Most of these only hold a time.
            if any(key in data[start : start + size] for key in (b" path=", b" size=", b" hdrcharset=", b" GNU.")):
                return None
        elif kind != tarfile.DIRTYPE:
            return None
        position = start + -(-size // BLOCK) * BLOCK
    return members


def tar_columns(file: Path) -> list[str] | None:
    """Return the columns of a tar's first good row, or None if it has no row."""
    return columns_of_rows(
        row for part in _chunks(file, chunk.BYTES_PER_CHUNK, file.stat().st_mtime_ns) for row in part.parsed()
    )


def tar_chunks(file: Path, layout: Layout) -> list[TarChunk]:
    """Divide a tar between samples, from the headers of its members.

    Raises DataError if the file is no tar, or is truncated.
    """
    return list(_chunks(file, chunk.BYTES_PER_CHUNK, file.stat().st_mtime_ns))


@lru_cache(maxsize=1)  # a file is first asked for its columns
def _chunks(file: Path, chunk_bytes: int, written_ns: int) -> tuple[TarChunk, ...]:
    chunks, size = [], file.stat().st_size
    with file.open("rb", buffering=0) as content:
        start = begin = position = 0
        last_key, is_ended = None, size == 0
        while position < size:
            header = os.pread(content.fileno(), BLOCK, position)
            if is_ended := not header.strip(b"\0") and len(header) == BLOCK:
                # The end of a tar; another one may follow.
                if position > start:
                    chunks.append(TarChunk(file, start, position))
                position += BLOCK
                start = begin = position
                continue
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise _unreadable(file, error) from error
            end = position + BLOCK * (1 + -(-member.size // BLOCK))
            if member.type not in EXTENSIONS:
                found = NAME.fullmatch(member.name)
                key = found and found[1]
                if key != last_key and begin - start >= chunk_bytes:
                    chunks.append(TarChunk(file, start, begin))
                    start = begin
                last_key, begin = key, end
            position = end
    if not is_ended or position > size:
        raise _unreadable(file, "it ends in the middle")
    return tuple(chunks)


def _unreadable(file: Path, error: object) -> DataError:
    return DataError(f"{as_text(file)} is not a readable tar: download it again or leave it out ({error})")


def _row(members: list[tuple[str, bytes]]) -> dict | BadRowError:
    row: dict = {}
    for kind, data in members:
        columns: dict | BadRowError
        if kind == "json":
            columns = parse_row(data, [])
        elif kind == "txt" or kind.endswith(".txt"):
            try:
                columns = {kind.removesuffix("txt").removesuffix(".") or "text": data.decode()}
            except UnicodeDecodeError:
                columns = BadRowError("text that is not UTF-8", "it has text that is not UTF-8")
        else:
            continue
        if isinstance(columns, BadRowError):
            return columns
        if repeated := row.keys() & columns.keys():
            return BadRowError("a column twice", f"it has the column {min(repeated)} twice")
        row |= columns
    return row

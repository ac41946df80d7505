"""`.json` files: an array of objects, which is one chunk and is read piece by piece, or lines like those of `.jsonl`."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRowError, BadRows, columns_of_rows
from data_pipeline.sources.chunk import Chunk
from data_pipeline.sources.compression import READ_FAULTS, open_bytes
from data_pipeline.sources.json_rows import end_of_value, loads, row_of, without_repetition
from data_pipeline.sources.jsonl import jsonl_chunks, jsonl_columns
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.names import as_text
from data_pipeline.sources.rows import Row, frames

BLOCK_BYTES = 2**20
BEGINNING = 4096  # bytes in which an array has to begin
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder(object_pairs_hook=without_repetition)
PLAIN = json.JSONDecoder()
# A value that the end of the text cuts is invalid there, or within the longest escape or word before it.
CUT_LENGTH = 16


@dataclass(frozen=True)
class JsonArrayChunk:
    """All elements of the array in a file."""

    file: Path
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        yield from frames(self.parsed(), layout, as_text(self.file.name), bad_rows)

    def parsed(self) -> Iterator[Row]:
        """Yield every row, or why it cannot be read, and its name."""
        for number, value in self._elements():
            yield row_of(value), partial("{}, row {}".format, as_text(self.file), number)

    def _elements(self) -> Iterator[tuple[int, object]]:
        number = 0
        try:
            with closing(open_bytes(self.file)) as content:
                for number, value in enumerate(_array_values(content), 1):
                    yield number, value
        except (*READ_FAULTS, ValueError) as error:
            raise DataError(
                f"{as_text(self.file)} is not a valid JSON array after row {number}: correct it, or leave it out ({error})"
            ) from error


def json_chunks(file: Path, layout: Layout) -> Sequence[Chunk]:
    """Return one chunk for an array, or the chunks of lines."""
    return [JsonArrayChunk(file)] if _is_array(file) else jsonl_chunks(file, layout)


def json_columns(file: Path) -> list[str] | None:
    """Return the keys of a file's first good row, or None if it has no row."""
    return columns_of_rows(JsonArrayChunk(file).parsed()) if _is_array(file) else jsonl_columns(file)


def _is_array(file: Path) -> bool:
    try:
        with closing(open_bytes(file)) as content:
            return content.read(BEGINNING).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except READ_FAULTS as error:
        raise DataError(f"{as_text(file)} cannot be read: download it again or leave it out ({error})") from error


def _array_values(content: BinaryIO) -> Iterator[object]:
    """Yield the elements of an array, or a BadRowError for one with a key twice. Raises ValueError if it is not valid."""
    text = _Text(content)
    text.expect("[")
    first = True
    while not (first and text.peek() == "]"):
        yield text.value()
        first = False
        if text.expect(",]") == "]":
            break
    else:
        text.expect("]")
    if text.peek():
        raise ValueError("there is more after the array")


class _Text:
    """The text of a file, of which only what is not yet decoded is in memory."""

    def __init__(self, content: BinaryIO) -> None:
        self._content, self._decoder = content, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position = "", 0

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty text at the end."""
        while True:
            if spaces := SPACE.match(self._text, self._position):
                self._position = spaces.end()
            if self._position < len(self._text) or not self._more():
                return self._text[self._position : self._position + 1]

    def expect(self, characters: str) -> str:
        """Read one of the characters. Raises ValueError if another one comes, or none."""
        if not (found := self.peek()) or found not in characters:
            raise ValueError(f"{' or '.join(characters)} is missing before {found!r}")
        self._position += 1
        return found

    def value(self) -> object:
        """Decode the next value; return a BadRowError if one of its keys occurs twice."""
        self.peek()
        while True:
            try:
                value, end = _scan(self._text, self._position)
                if end < len(self._text) or not self._more():
                    self._position = min(end, len(self._text))
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - CUT_LENGTH
                if not is_cut or not self._more():
                    raise

    def _more(self) -> bool:
        """Double the text in memory. With smaller steps, a long value would be decoded again and again."""
        rest = self._text[self._position :]
        block = self._content.read(max(BLOCK_BYTES, len(rest)))
        self._text, self._position = rest + self._decoder.decode(block, final=not block), 0
        return bool(block)


def _scan(text: str, start: int) -> tuple[object, int]:
    """Return the value that begins at `start`, and its end. Raises JSONDecodeError if it is not valid or cut."""
    try:
        try:
            return DECODER.raw_decode(text, start)
        except BadRowError as error:
            return error, PLAIN.raw_decode(text, start)[1]
    except RecursionError:
        end = end_of_value(text, start)
        if end is None:
            raise json.JSONDecodeError("Unterminated value starting at", text, start) from None
        try:
            return loads(text[start:end], object_pairs_hook=without_repetition), end
        except BadRowError as error:
            return error, end

"""Where the records of a comma- or tab-separated text end: a quoted value may hold line feeds.

As in pyarrow, a quote opens a value only at its beginning. So the 5" in `a 5" pipe,b` opens none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.names import as_text

QUOTE, LINE_FEED, CARRIAGE_RETURN = b'"\n\r'
LONGEST_RECORD = 2**27  # bytes; more is a quote that nobody closes


def whole_records(content: BinaryIO, file: Path, delimiter: bytes, size: int) -> Iterator[memoryview]:
    """Yield blocks of about `size` bytes that consist of whole records. The content begins with a record.

    Raises DataError, which names the file, if a quoted value has no end.
    """
    rest = b""
    while block := content.read(size):
        text = rest + block
        end = last_record_end(text, delimiter)
        if end:
            yield memoryview(text)[:end]
        rest = text[end:]
        if len(rest) > LONGEST_RECORD:
            break
    if rest and (len(rest) > LONGEST_RECORD or not last_record_end(rest + b"\n", delimiter)):
        raise DataError(
            f"{as_text(file)} has a quoted value without an end, which begins with {_excerpt(rest)}: close or remove the quote"
        )
    if rest:
        yield memoryview(rest)


def last_record_end(text: bytes, delimiter: bytes) -> int:
    """Return where the last whole record ends, or 0. The text begins with a record."""
    end = text.rfind(b"\n") + 1
    if end == 0 or b'"' not in text:
        return end
    letters = np.frombuffer(text, dtype=np.uint8)
    quotes = np.flatnonzero(letters == QUOTE)
    # An even number of quotes before a line feed: it is outside of quoted values, if all quotes are where they belong.
    while end and np.searchsorted(quotes, end) % 2:
        end = text.rfind(b"\n", 0, end - 1) + 1
    quotes = quotes[quotes < end]
    borders = (ord(delimiter), LINE_FEED, CARRIAGE_RETURN, QUOTE)
    opening, closing = quotes[::2], quotes[1::2]
    before, behind = letters[opening[opening > 0] - 1], letters[closing + 1]
    if end and np.isin(before, borders).all() and np.isin(behind, borders).all():
        return end
    return _last_record_end_exactly(text, delimiter)


def _last_record_end_exactly(text: bytes, delimiter: bytes) -> int:
    """Do the same value by value, for a text that has other quotes than those around values."""
    borders = {ord(delimiter), LINE_FEED, CARRIAGE_RETURN}
    end = position = 0
    while (opening := text.find(b'"', position)) >= 0:
        end = text.rfind(b"\n", position, opening) + 1 or end
        position = opening + 1
        if opening and text[opening - 1] not in borders:
            continue
        while True:
            closing = text.find(b'"', position)
            position = closing + 1
            if closing < 0 or position == len(text):
                return end
            if text[position] != QUOTE:
                break
            position += 1
    return text.rfind(b"\n", position) + 1 or end


def _excerpt(text: bytes) -> str:
    """Return the beginning of the last value that a quote opens."""
    return repr(text[max(text.find(b'"'), 0) :][:60].decode(errors="replace"))

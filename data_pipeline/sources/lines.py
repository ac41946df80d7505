"""The lines of a range of a file. Each line is in exactly one range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from data_pipeline.sources.chunk import BYTES_PER_CHUNK
from data_pipeline.sources.compression import independent_parts, is_compressed, open_bytes

COPY_BYTES = 2**20


def line_ranges(file: Path, bytes_per_chunk: int = BYTES_PER_CHUNK) -> list[tuple[int, int]]:
    """Divide a file of lines into ranges of its bytes; a compressed file only between parts that stand for themselves."""
    if is_compressed(file):
        return independent_parts(file)
    size = file.stat().st_size
    return [(start, min(start + bytes_per_chunk, size)) for start in range(0, size, bytes_per_chunk)]


def lines_of(file: Path, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines that begin after a line feed within the range, and the first line of the file if start is 0.

    So a range need not know what precedes it. The last of its lines may continue after it, or begin at its end.
    """
    with closing(open_bytes(file, start, end)) as content:
        if start and not content.readline().endswith(b"\n"):
            return
        line = b"\n"
        for line in content:
            if line.endswith(b"\n"):
                yield line
    with closing(open_bytes(file, end)) as rest:
        line = rest.readline() if line.endswith(b"\n") else line + rest.readline()
    if line:
        yield line


def lines_before(file: Path, start: int) -> int:
    """Count the lines of a file before those of the range that begins at `start`."""
    if not start:
        return 0
    with closing(open_bytes(file, 0, start)) as content:
        return 1 + sum(block.count(b"\n") for block in iter(lambda: content.read(COPY_BYTES), b""))

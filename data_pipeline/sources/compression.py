"""Compressed files as streams of bytes, and which parts of them can be read on their own.

Independent parts are the frames of zstd (`pzstd` writes many, `zstd` one) and the blocks of gzip files that `bgzip` wrote.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from data_pipeline.sources.chunk import BYTES_PER_CHUNK

BUFFER_BYTES = 2**20
COMPRESSED_BYTES_PER_CHUNK = BYTES_PER_CHUNK // 4  # text shrinks to about a quarter
# A part never ends at a longer zstd frame, so a file that is a single long frame is not searched to its end.
LONGEST_FRAME = 2**28
ZSTD_MAGIC, SKIPPABLE_MAGIC = 0xFD2FB528, 0x184D2A50
BGZIP_HEADER = b"\x1f\x8b\x08\x04"  # gzip with an extra field
READ_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class _Slice(io.RawIOBase):
    """The bytes of a file from `start` to before `end`."""

    def __init__(self, file: Path, start: int, end: int | None) -> None:
        self._file, self._end = file.open("rb", buffering=0), end
        self._position = self._file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = len(buffer) if self._end is None else min(len(buffer), self._end - self._position)
        count = self._file.readinto(memoryview(buffer)[:left]) if left > 0 else 0
        self._position += count
        return count

    def readall(self) -> bytes:
        """Read the rest in large pieces; the inherited method reads 8 KiB at a time."""
        return b"".join(iter(lambda: self.read(BYTES_PER_CHUNK), b""))

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bytes(file: Path, start: int = 0, end: int | None = None) -> BinaryIO:
    """Open the content of a file, decompressed if its name says that it is compressed.

    start, end: a range of the file's own bytes, which must be one of `independent_parts` if the file is compressed.
    Reading raises one of READ_FAULTS if the file is damaged.
    """
    content = io.BufferedReader(_Slice(file, start, end), BUFFER_BYTES)
    decompress = COMPRESSIONS.get(file.suffix.lower())
    return decompress(content) if decompress and content.peek(1) else content  # an empty range has no header


def is_compressed(file: PurePath) -> bool:
    """Tell whether a file is compressed, by its name."""
    return file.suffix.lower() in COMPRESSIONS


def independent_parts(file: Path) -> list[tuple[int, int]]:
    """Divide a compressed file into ranges of bytes that can be decompressed on their own, of the size of a chunk."""
    size = file.stat().st_size
    ends = {".zst": _zstd_frames, ".gz": _bgzip_blocks}.get(file.suffix.lower(), lambda *_: iter(()))
    parts, start = [], 0
    with file.open("rb", buffering=0) as opened:
        for end in ends(opened.fileno(), size):
            if end - start >= COMPRESSED_BYTES_PER_CHUNK:
                parts.append((start, end))
                start = end
    return [*parts, (start, size)] if start < size or not parts else parts


def _unzstd(content: BinaryIO) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(content, "r"), "zstd"), BUFFER_BYTES)


def _ungzip(content: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=content), BUFFER_BYTES)


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": _ungzip,
    ".zst": _unzstd,
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}


def _zstd_frames(file: int, size: int) -> Iterator[int]:
    """Yield the ends of zstd's frames (RFC 8878), from the headers of their blocks; stop at anything else."""
    position = 0
    while position < size:
        header = os.pread(file, 8, position)
        magic = int.from_bytes(header[:4], "little")
        if magic & 0xFFFFFFF0 == SKIPPABLE_MAGIC:
            position += 8 + int.from_bytes(header[4:], "little")
        elif magic == ZSTD_MAGIC and len(header) > 4 and (end := _end_of_frame(file, position, header[4])):
            position = end
        else:
            return
        if position <= size:
            yield position


def _end_of_frame(file: int, start: int, descriptor: int) -> int | None:
    single_segment, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    position = start + 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size
    is_last = 0
    while not is_last:
        header = os.pread(file, 3, position)
        if len(header) < 3 or position - start > LONGEST_FRAME:
            return None
        bits = int.from_bytes(header, "little")
        is_last, kind, length = bits & 1, bits >> 1 & 3, bits >> 3
        position += 3 + (1 if kind == 1 else length)  # kind 1: one byte, repeated
    return position + 4 * has_checksum


def _bgzip_blocks(file: int, size: int) -> Iterator[int]:
    """Yield the ends of the blocks of a file that bgzip wrote (SAM specification, 4.1); stop at anything else."""
    position = 0
    while position < size:
        header = os.pread(file, 18, position)
        if len(header) < 18 or header[:4] != BGZIP_HEADER or header[12:16] != b"BC\x02\x00":
            return
        position += int.from_bytes(header[16:18], "little") + 1
        if position <= size:
            yield position

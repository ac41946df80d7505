"""Files of bytes, compressed or not, by their suffix."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
# What reading a damaged file raises.
FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def is_compressed(file: Path) -> bool:
    """Whether the suffix names a compression."""
    return file.suffix.lower() in COMPRESSIONS


def open_bytes(file: Path) -> BinaryIO:
    """Open a file for reading its uncompressed bytes. Reading raises one of FAULTS if the file is damaged."""
    openers: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstandard}
    return openers.get(file.suffix.lower(), Path.open)(file, "rb")


def _open_zstandard(file: Path, mode: str) -> BinaryIO:
    import pyarrow as pa  # Python's own module is new in 3.14

    raw = pa.CompressedInputStream(pa.OSFile(str(file), mode), "zstd")
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw)))

"""Shards: WebDataset tars of packed rows, and the index that completes a folder of them.

A row is stored as two members of its tar:

- `KEY.tokens.npy`: `[seq_len]`, uint16, or uint32 above 65,536 ids
- `KEY.spans.npy`: int64 `[pieces, 6]`, with the columns of `packing.SPAN_COLUMNS`

`SHARD.offsets.npy` (uint64 `[rows, 2]`), next to `SHARD.tar`, holds the positions in the tar at which the data of the two
members begin. `index.json` is written last: a folder without it is unfinished.
"""

import hashlib
import io
import json
import os
import socket
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import sync_folder
from data_pipeline.shards.packing import PackedRows

FORMAT_VERSION = 2
# Version 1 had only documents of one turn, and no plain texts. All of its folders are valid in version 2.
READ_VERSIONS = (1, 2)
INDEX_NAME = "index.json"
TOKENIZER_FOLDER = "tokenizer"
VALIDATION_FOLDER = "validation"
PARTIAL_SUFFIX = ".partial"
TAR_RECORD_BYTES = tarfile.RECORDSIZE
BLOCK_BYTES = 2**20


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smaller token type if it holds all ids, otherwise the larger one."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> dict:
    """Write a file under a temporary name unique to this process, sync and rename it; return its size and sha256."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL_SUFFIX}")
    digest, size = hashlib.sha256(), 0
    try:
        with partial.open("wb") as file:
            for block in _blocks(parts):
                file.write(block)
                digest.update(block)
                size += len(block)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # frees its space if the disk is full
        raise
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Join small parts into blocks: hashing and writing a few hundred bytes at a time costs more than copying them."""
    gathered, size = [], 0
    for part in parts:
        gathered.append(part)
        size += len(part)
        if size >= BLOCK_BYTES:
            yield b"".join(gathered)
            gathered, size = [], 0
    yield b"".join(gathered)


def write_shard(folder: Path, name: str, rows: PackedRows) -> dict:
    """Write `name.tar` and `name.offsets.npy`; the bytes depend only on the rows. Return the shard's index entry."""
    tokens = np.ascontiguousarray(rows.tokens)
    spans = np.ascontiguousarray(rows.spans, dtype=np.int64)
    span_ends = np.cumsum(rows.pieces)
    kinds = sorted(set(rows.pieces.tolist()))
    # The members of a shard differ only in the number in their name and in their data; the rest is built once.
    tokens_start = _Start(f"{name}-%06d.tokens.npy", tokens[:1].reshape(-1))
    spans_starts = {count: _Start(f"{name}-%06d.spans.npy", spans[:count]) for count in kinds}
    offsets = np.empty((len(tokens), 2), dtype=np.uint64)
    parts: list[bytes | memoryview] = []
    position = 0
    for number, (count, end) in enumerate(zip(rows.pieces.tolist(), span_ends.tolist(), strict=True)):
        for column, (start, array) in enumerate(
            ((tokens_start, tokens[number]), (spans_starts[count], spans[end - count : end]))
        ):
            header, data_at, padding = start.of(number)
            parts += (header, array.data.cast("B"), padding)
            offsets[number, column] = position + data_at
            position += len(header) + array.nbytes + len(padding)
    closing = 2 * tarfile.BLOCKSIZE
    parts.append(bytes(closing + -(position + closing) % TAR_RECORD_BYTES))
    tar = write_file(folder / f"{name}.tar", parts)
    offsets_file = write_file(folder / f"{name}.offsets.npy", [_npy_bytes(offsets)])
    return {
        "name": f"{name}.tar",
        "rows": len(tokens),
        **tar,
        "offsets": {"name": f"{name}.offsets.npy", **offsets_file},
    }


class _Start:
    """The bytes in a tar before the data of an array of a given shape: a tar header, then an npy header."""

    def __init__(self, pattern: str, array: np.ndarray) -> None:
        npy_header = _npy_bytes(array)[: -array.nbytes]
        size = len(npy_header) + array.nbytes
        header = tarfile.TarInfo(pattern % 0)  # its time, user and group default to zero
        header.size = size
        self._digits_at = pattern.index("%")
        # The position of the tar checksum: six octal digits, the sum of the header's bytes with the checksum as spaces.
        self._sum_at = 148
        self._header = bytearray(header.tobuf(format=tarfile.USTAR_FORMAT) + npy_header)
        self._sum = int(self._header[self._sum_at : self._sum_at + 6], 8)
        self._padding = bytes(-size % tarfile.BLOCKSIZE)

    def of(self, number: int) -> tuple[bytes, int, bytes]:
        """Return the headers of member `number`, the offset in them of its npy file, and the padding after its data."""
        digits = b"%06d" % number
        self._header[self._digits_at : self._digits_at + 6] = digits
        self._header[self._sum_at : self._sum_at + 6] = b"%06o" % (self._sum + sum(digits) - 6 * ord("0"))
        return bytes(self._header), tarfile.BLOCKSIZE, self._padding


def write_index(folder: Path, index: dict) -> None:
    """Write the index, which completes the folder; every file it names must already be durable under its final name."""
    sync_folder(folder)
    write_file(folder / INDEX_NAME, [(json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode()])
    sync_folder(folder)


def read_index(folder: Path) -> dict:
    """Read the index of a finished folder; raise DataError if it is missing, unreadable or of another format version."""
    if not folder.is_dir():
        raise DataError(f"there is no shard folder {folder}: make it with `lfm prepare SOURCE --out {folder}`")
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"the shard folder {folder} is unfinished, it has no {INDEX_NAME}: run `lfm prepare` on it again"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: remove the folder and prepare it again ({error})") from error
    version = index.get("format_version") if isinstance(index, dict) else None
    if version not in READ_VERSIONS:
        raise DataError(
            f"{path} has format version {version}, but this program reads {' and '.join(map(str, READ_VERSIONS))}: prepare "
            "the data again"
        )
    return index


def files_of(index: dict) -> list[dict]:
    """List the name, size and sha256 of every file in the folder except the index."""
    return [*index["files"], *(shard["offsets"] for shard in index["files"]), *index["tokenizer"]["files"]]


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()

"""Shards: WebDataset tars of packed rows, and the index that makes a folder of them complete.

A row is two members of its tar, `KEY.tokens.npy` (uint16, or uint32 above 65,536 ids; `[seq_len]`) and `KEY.spans.npy`
(int64 `[pieces, 6]`, columns as in `packing.SPAN_COLUMNS`). Beside `SHARD.tar` stands `SHARD.offsets.npy` (uint64
`[rows, 2]`): where in the tar the two members' data begin. `index.json` is written last: a folder without it is
unfinished.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.packing import PackedRow

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
TOKENIZER_FOLDER = "tokenizer"
PARTIAL_SUFFIX = ".partial"
TAR_RECORD_BYTES = tarfile.RECORDSIZE


def token_dtype(vocab_size: int) -> type:
    """Gives the smallest of the two token types that holds all ids."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_file(path: Path, parts: Iterable[bytes]) -> dict:
    """Writes a file under a temporary name, syncs and renames it; returns its bytes and sha256."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    digest, size = hashlib.sha256(), 0
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_shard(folder: Path, name: str, rows: Sequence[PackedRow]) -> dict:
    """Writes `name.tar` and `name.offsets.npy`, the same bytes for the same rows; returns the shard's index entry."""
    offsets = np.empty((len(rows), 2), dtype=np.uint64)

    def members() -> Iterable[bytes]:
        position = 0
        for number, row in enumerate(rows):
            for column, (kind, array) in enumerate((("tokens", row.tokens), ("spans", row.spans))):
                data = _npy_bytes(array)
                header = tarfile.TarInfo(f"{name}-{number:06d}.{kind}.npy")  # its time, user and group are zero
                header.size = len(data)
                header_bytes = header.tobuf(format=tarfile.USTAR_FORMAT)
                offsets[number, column] = position + len(header_bytes)
                member = header_bytes + data + bytes(-len(data) % tarfile.BLOCKSIZE)
                position += len(member)
                yield member
        end = 2 * tarfile.BLOCKSIZE
        yield bytes(end + -(position + end) % TAR_RECORD_BYTES)

    tar = write_file(folder / f"{name}.tar", members())
    offsets_file = write_file(folder / f"{name}.offsets.npy", [_npy_bytes(offsets)])
    return {
        "name": f"{name}.tar",
        "rows": len(rows),
        **tar,
        "offsets": {"name": f"{name}.offsets.npy", **offsets_file},
    }


def write_index(folder: Path, index: dict) -> None:
    """Writes the index, which completes the folder; everything it names must be durable under its final name."""
    _sync_folder(folder)
    write_file(folder / INDEX_NAME, [(json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode()])
    _sync_folder(folder)


def read_index(folder: Path) -> dict:
    """Reads the index of a finished folder; raises DataError where there is none, or one of another format."""
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
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version} and this program reads {FORMAT_VERSION}: prepare the data again"
        )
    return index


def files_of(index: dict) -> list[dict]:
    """Lists the name, bytes and sha256 of every file of the folder except the index."""
    return [*index["files"], *(shard["offsets"] for shard in index["files"]), *index["tokenizer"]["files"]]


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

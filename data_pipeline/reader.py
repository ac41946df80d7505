"""Reading a finished shard folder, row by row, in any order."""

import hashlib
import io
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards import TOKENIZER_FOLDER, files_of, read_index


class ShardFolder:
    """A finished shard folder, read by row number; any number of processes may share one.

    index: the contents of index.json. fingerprint: changes with any token, span or the tokenizer. vocab_size: the
    tokenizer's number of tokens. rows_per_file: rows of each shard, in order.
    Raises DataError where the folder is missing, unfinished or of another format, or a file is missing or has the
    wrong size.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.index = read_index(self.path)
        _check_sizes(self.path, self.index)
        self.seq_len: int = self.index["seq_len"]
        self.vocab_size: int = self.index["vocab_size"]
        self.pad_token_id: int = self.index["tokenizer"]["pad_token_id"]
        self.tokenizer_path = self.path / TOKENIZER_FOLDER
        self.rows_per_file: list[int] = [shard["rows"] for shard in self.index["files"]]
        self.num_rows = sum(self.rows_per_file)
        self.fingerprint = _folder_fingerprint(self.index)
        self._first_rows = np.concatenate([[0], np.cumsum(self.rows_per_file)])
        self._open_shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        # A memory map would travel to another process as the whole file.
        return self.__dict__ | {"_open_shards": {}}

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads one row: its tokens `[seq_len]` and spans `[pieces, 6]`, read-only views of the file."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        data, offsets = self._open_shard(shard)
        tokens_at, spans_at = offsets[row - int(self._first_rows[shard])]
        name = self.index["files"][shard]["name"]
        return _read_npy(data, int(tokens_at), name), _read_npy(data, int(spans_at), name)

    def _open_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._open_shards:
            entry = self.index["files"][shard]
            offsets = np.load(self.path / entry["offsets"]["name"], allow_pickle=False)
            data = np.asarray(np.memmap(self.path / entry["name"], dtype=np.uint8, mode="r"))
            self._open_shards[shard] = (data, offsets)
        return self._open_shards[shard]


def _check_sizes(folder: Path, index: dict) -> None:
    for entry in files_of(index):
        path = folder / entry["name"]
        if Path(entry["name"]).is_absolute() or ".." in Path(entry["name"]).parts:
            raise DataError(f"the index of {folder} names {entry['name']}, outside the folder: prepare the data again")
        if not path.is_file():
            raise DataError(f"{path} is missing, which the index names: copy or prepare the folder again")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes and the index says {entry['bytes']}: copy or prepare it again"
            )


def _folder_fingerprint(index: dict) -> str:
    parts = [shard["sha256"] for shard in index["files"]] + [index["tokenizer"]["fingerprint"]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_npy(data: np.ndarray, offset: int, name: str) -> np.ndarray:
    header_end = offset + 10 + int.from_bytes(data[offset + 8 : offset + 10].tobytes(), "little")
    shape, dtype, size = _parse_npy_header(data[offset:header_end].tobytes(), name)
    return data[header_end : header_end + size].view(dtype).reshape(shape)


@lru_cache(maxsize=4096)  # rows share a few headers, and parsing one costs more than reading a row
def _parse_npy_header(header: bytes, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    stream = io.BytesIO(header)
    try:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise DataError(f"{name} is corrupt: `lfm verify` the folder, then copy or prepare it again") from error
    if dtype.hasobject:
        raise DataError(f"{name} holds pickled objects, which are never read: prepare the data again")
    return shape, dtype, dtype.itemsize * int(np.prod(shape))

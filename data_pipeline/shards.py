"""Shards: WebDataset tars of packed rows, the index that makes a folder of them complete, and the reader.

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
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
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


def verify(path: str | os.PathLike, progress: Callable[[int], None] | None = None) -> dict:
    """Rehashes every file of a shard folder and recounts its rows, documents and tokens; returns the index.

    progress: called with the number of bytes of each file once it is checked. Raises DataError naming the bad file.
    """
    folder = ShardFolder(path)
    for entry in files_of(folder.index):
        with (folder.path / entry["name"]).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise DataError(f"{folder.path / entry['name']} has changed since it was written: copy or prepare it again")
        if progress:
            progress(entry["bytes"])
    counted = {"packed_rows": 0, "documents": 0, "tokens": 0}
    for row in range(folder.num_rows):
        tokens, spans = folder.read(row)
        _check_row(folder, row, tokens, spans)
        counted["packed_rows"] += 1
        counted["documents"] += int((spans[:, 5] == 0).sum())
        counted["tokens"] += int(spans[-1, 2])
    counts = folder.index["counts"]
    for name, number in counted.items():
        if counts[name] != number:
            raise DataError(f"{folder.path} holds {number} {name} and its index says {counts[name]}: prepare it again")
    return folder.index


def _check_row(folder: ShardFolder, row: int, tokens: np.ndarray, spans: np.ndarray) -> None:
    starts, answers, ends = spans[:, 0], spans[:, 1], spans[:, 2]
    sound = (
        tokens.shape == (folder.seq_len,)
        and len(spans) > 0
        and starts[0] == 0
        and np.array_equal(starts[1:], ends[:-1])
        and ends[-1] <= folder.seq_len
        and bool(np.all((starts <= answers) & (answers <= ends) & (starts < ends)))
        and bool(np.all(tokens[ends[-1] :] == folder.pad_token_id))
        and int(tokens.max()) < folder.vocab_size
    )
    if not sound:
        raise DataError(f"row {row} of {folder.path} breaks the format of shards: prepare the folder again")


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


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

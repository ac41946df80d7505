"""Read finished shard folders by row number, in any order. Files that differ from the index are never read."""

import contextlib
import errno
import hashlib
import io
import mmap
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.loading.integrity import BadFileError, check_file, check_index, check_length, check_size
from data_pipeline.loading.order import SHARDS_PER_BLOCK, MixtureOrder, RowOrder
from data_pipeline.loading.remote import RemoteFolder, ShardCache, is_remote
from data_pipeline.shards.format import TOKENIZER_FOLDER, read_index, token_dtype
from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows

ON_BAD_SHARD = ("refuse", "skip")
NO_ROW = -1  # a row number that stands for a row of padding
# Per folder and process: a batch may span two blocks.
MAX_OPEN_SHARDS = 2 * SHARDS_PER_BLOCK
NPY_HEADER_BYTES = 128  # as numpy writes the arrays in a shard
SPAN_BYTES = 8 * len(SPAN_COLUMNS)
FETCHING_THREADS = 4  # per remote folder


class RowReader(ABC):
    """Packed rows by number, from one folder or from several folders as if they were one.

    location: the name in messages.
    seq_len, vocab_size, pad_token_id: the same for all rows.
    sources: the names that spans refer to.
    tokenizer_path, tokenizer_fingerprint: the tokenizer that made the rows.
    fingerprint: changes with any token or span, with the tokenizer and with the mixture.
    num_rows: the number of rows of all folders.
    """

    location: str
    seq_len: int
    vocab_size: int
    pad_token_id: int
    sources: list[str]
    tokenizer_path: Path
    tokenizer_fingerprint: str
    fingerprint: str
    num_rows: int
    _first_rows: np.ndarray  # the first row of each shard, and num_rows at the end

    @abstractmethod
    def order(self, seed: int) -> RowOrder | MixtureOrder:
        """Return the endless order of the rows."""

    @abstractmethod
    def open_shard(self, shard: int) -> "OpenShard | None":
        """Open a shard after checking its hash. Return None if it is bad and bad shards are skipped."""

    @abstractmethod
    def look_ahead(self, shards: Iterable[int]) -> None:
        """Start fetching and checking shards in the background, in the order in which they will be needed."""

    def gather(self, rows: np.ndarray) -> PackedRows:
        """Read rows by number, int64 `[n]`. NO_ROW and the rows of skipped shards become padding.

        Raises DataError if a shard differs from the index (unless bad shards are skipped), or breaks the format.
        """
        if not NO_ROW <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} are not all among the {self.num_rows} rows")
        shards = np.where(rows == NO_ROW, -1, np.searchsorted(self._first_rows, rows, side="right") - 1)
        shards_of_rows, rows_in_shards = shards.tolist(), (rows - self._first_rows[shards]).tolist()
        opened = {shard: self.open_shard(shard) for shard in dict.fromkeys(shards_of_rows) if shard >= 0}
        dtype = np.dtype(token_dtype(self.vocab_size))
        header, padding = _blank_row(self.seq_len, dtype, self.pad_token_id)
        tokens, spans, pieces = [], [], []
        for shard, row in zip(shards_of_rows, rows_in_shards, strict=True):
            source = opened.get(shard)
            if source is None:
                tokens.append(padding)
                pieces.append(0)
                continue
            tokens_at, spans_at = source.offsets[row]
            tokens.append(source.data[tokens_at : tokens_at + len(padding)])
            count = source.count_spans(spans_at)
            spans_at += NPY_HEADER_BYTES
            spans.append(source.data[spans_at : spans_at + count * SPAN_BYTES])
            pieces.append(count)
        # One copy for the whole batch; per row, Python only makes the slices above.
        all_tokens, all_spans = b"".join(tokens), b"".join(spans)
        members = np.frombuffer(all_tokens, dtype=np.uint8)
        if (
            len(members) != len(rows) * len(padding)
            or len(all_spans) != sum(pieces) * SPAN_BYTES
            or (members.reshape(len(rows), -1)[:, : len(header)] != header).any()
        ):
            names = ", ".join(shard.name for shard in opened.values() if shard)
            raise DataError(
                f"a row in one of {names} is not {self.seq_len} tokens of {dtype.name} with spans: prepare the data again"
            )
        return PackedRows(
            members.reshape(len(rows), -1)[:, len(header) :].view(dtype),
            np.frombuffer(all_spans, dtype=np.int64).reshape(-1, len(SPAN_COLUMNS)),
            np.array(pieces, dtype=np.int64),
        )


class ShardFolder(RowReader):
    """A finished shard folder, read by row number. Any number of processes may read the same folder.

    path: a local folder, or the URL of a folder, whose shards are then read through the cache.
    on_bad_shard: what to do if a shard is missing, or if its size or sha256 differs from the index. `refuse` raises
    BadFileError; `skip` turns its rows into padding.
    index: the contents of index.json.
    rows_per_file: the number of rows of each shard, in order.
    bad_shards: the error message for each shard that was found bad, by its number.
    Raises DataError if the folder is missing, unfinished or of another format. Raises BadFileError, a DataError, if a file
    is missing or has the wrong size; shards then follow `on_bad_shard`.
    """

    def __init__(self, path: str | os.PathLike, on_bad_shard: str = "refuse", cache: ShardCache | None = None) -> None:
        if on_bad_shard not in ON_BAD_SHARD:
            raise DataError(f"on_bad_shard is {on_bad_shard!r}: give one of {', '.join(ON_BAD_SHARD)}")
        self.location = str(path)
        self._remote = RemoteFolder(str(path), cache or ShardCache()) if is_remote(path) else None
        self.path = self._remote.metadata if self._remote else Path(path)
        self.index = read_index(self.path)
        check_index(self.location, self.index)
        self.on_bad_shard = on_bad_shard
        self.bad_shards: dict[int, str] = {}
        self.seq_len = self.index["seq_len"]
        self.vocab_size = self.index["vocab_size"]
        self.pad_token_id = self.index["tokenizer"]["pad_token_id"]
        self.sources = self.index["sources"]
        self.tokenizer_path = self.path / TOKENIZER_FOLDER
        self.tokenizer_fingerprint = self.index["tokenizer"]["fingerprint"]
        self.rows_per_file: list[int] = [shard["rows"] for shard in self.index["files"]]
        self.num_rows = sum(self.rows_per_file)
        self.fingerprint = _folder_fingerprint(self.index)
        self._first_rows = np.concatenate([[0], np.cumsum(self.rows_per_file)])
        self._start_empty()
        self._check_sizes()

    def _start_empty(self) -> None:
        self._checked: set[int] = set()
        self._expected: deque[int] = deque()
        self._threads = 0
        self._open_shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._shard_locks = [threading.Lock() for _ in self.rows_per_file]

    def __getstate__(self) -> dict:
        # Memory maps, locks and threads are not pickled: every process has its own.
        own = ("_checked", "_expected", "_open_shards", "_lock", "_shard_locks", "_threads")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def order(self, seed: int) -> RowOrder:
        return RowOrder(self.num_rows, self.fingerprint, seed, self.rows_per_file)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens `[seq_len]` and spans `[pieces, 6]` of one row, as read-only views of the file.

        Meant for inspecting single rows: unlike `gather`, it does not check the hash of the shard.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} is not among the {self.num_rows} rows")
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        opened = self._open(shard)
        tokens_at, spans_at = opened.offsets[row - int(self._first_rows[shard])]
        return opened.read_npy(tokens_at), opened.read_npy(spans_at)

    def open_shard(self, shard: int) -> "OpenShard | None":
        if self._is_good(shard):
            try:
                opened = self._open(shard)
                opened.check_length()
                return opened
            except BadFileError as error:  # it was good when checked, and has been removed or cut since
                self._skip(shard, error)
                with self._shard_locks[shard], self._lock:
                    self._checked.discard(shard)
                    self._open_shards.pop(shard, None)
        # Raised here and not when the last shard is found bad, because that may happen in a background thread.
        if len(self.bad_shards) == len(self.rows_per_file):
            raise DataError(f"every shard of {self.location} is bad: copy or prepare the folder again")
        return None

    def look_ahead(self, shards: Iterable[int]) -> None:
        with self._lock:
            new = [shard for shard in shards if shard not in self._checked and shard not in self._expected]
            if self._remote:  # shards fetched too early would be deleted from the cache before they are read
                sizes = np.cumsum([self.index["files"][shard]["bytes"] for shard in new])
                new = new[: int(np.searchsorted(sizes, self._remote.cache.limit_bytes // 2, side="right"))]
            self._expected += new
            for _ in range(min(len(new), (FETCHING_THREADS if self._remote else 1) - self._threads)):
                self._threads += 1
                # Daemon threads, because a store that does not answer must not keep the process from exiting.
                threading.Thread(target=self._check_expected, daemon=True).start()

    def _check_expected(self) -> None:
        while True:
            with self._lock:
                if not self._expected:
                    self._threads -= 1
                    return
                shard = self._expected.popleft()
            # Errors are ignored here: the thread that reads the shard meets them again and reports them.
            with contextlib.suppress(DataError, OSError):
                self._is_good(shard)

    def _is_good(self, shard: int) -> bool:
        """Check the hashes of a shard, once per process. If it is bad, raise BadFileError, or return False to skip it."""
        with self._shard_locks[shard]:
            if shard in self._checked:
                return True
            if shard not in self.bad_shards:
                try:
                    for entry in self._entries(shard):
                        self._check(entry)
                    self._checked.add(shard)
                    return True
                except BadFileError as error:
                    self._skip(shard, error)
        return False

    def _check(self, entry: dict) -> None:
        if self._remote is None:
            with self._open_file(entry) as file:
                return check_file(file, self._name_of(entry), entry)
        # The cached copy may be old and damaged since; then it is downloaded again, which checks it.
        with self._open_file(entry) as file:
            try:
                return check_file(file, self._name_of(entry), entry)
            except BadFileError:
                self._remote.discard(entry)
        self._open_file(entry).close()

    def _open_file(self, entry: dict) -> BinaryIO:
        if self._remote:
            return self._remote.open(entry)
        try:
            return (self.path / entry["name"]).open("rb")
        except FileNotFoundError:
            raise BadFileError(f"{self._name_of(entry)} is missing: copy or prepare the folder again") from None
        except OSError as error:
            name = self._name_of(entry)
            if error.errno in (errno.EMFILE, errno.ENFILE):  # the shard is not to blame, so it must not be skipped
                raise DataError(
                    f"{name} cannot be opened: too many files are open; raise the limit (ulimit -n)"
                ) from error
            raise BadFileError(
                f"{name} cannot be read ({error.strerror}): fix the cause, or copy the folder again"
            ) from error

    def _name_of(self, entry: dict) -> str:
        return self._remote.name_of(entry) if self._remote else str(self.path / entry["name"])

    def _skip(self, shard: int, error: BadFileError) -> None:
        if self.on_bad_shard == "refuse":
            raise error
        self.bad_shards[shard] = str(error)
        print(f"on_bad_shard is skip, so {self.rows_per_file[shard]} rows have no labels: {error}", file=sys.stderr)

    def _check_sizes(self) -> None:
        for entry in self.index["tokenizer"]["files"]:
            check_size(self.path / entry["name"], entry)
        for shard in range(0 if self._remote else len(self.rows_per_file)):
            try:
                for entry in self._entries(shard):
                    check_size(self.path / entry["name"], entry)
            except BadFileError as error:
                self._skip(shard, error)

    def _entries(self, shard: int) -> tuple[dict, dict]:
        entry = self.index["files"][shard]
        return entry, entry["offsets"]

    def _open(self, shard: int) -> "OpenShard":
        with self._shard_locks[shard]:
            with self._lock:
                if shard in self._open_shards:
                    self._open_shards.move_to_end(shard)
                    return self._open_shards[shard]
            entry, offsets = self._entries(shard)
            with self._open_file(entry) as tar, self._open_file(offsets) as at:
                # A file may have changed since its hash was checked.
                for file, described in ((tar, entry), (at, offsets)):
                    check_length(file, self._name_of(described), described)
                opened = OpenShard(tar, at, self._name_of(entry), self.rows_per_file[shard])
            with self._lock:
                self._open_shards[shard] = opened
                if len(self._open_shards) > MAX_OPEN_SHARDS:
                    self._open_shards.popitem(last=False)
            return opened


class OpenShard:
    """The memory-mapped tar of one shard, and the positions in it of each row's two members.

    A lock on the tar is held as long as this object exists. Raises DataError if tar and offsets do not fit together.
    """

    def __init__(self, tar: BinaryIO, offsets: BinaryIO, name: str, rows: int) -> None:
        self.name = name
        self._map = mmap.mmap(tar.fileno(), 0, access=mmap.ACCESS_READ)  # the map has its own file descriptor
        self.data = memoryview(self._map)
        try:
            at = np.load(offsets, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"the offsets of {name} are not a numpy array: copy or prepare the folder again") from error
        if at.shape != (rows, 2) or at.dtype != np.uint64 or at.max() > len(self.data) - NPY_HEADER_BYTES:
            raise DataError(f"the offsets of {name} do not fit it: copy or prepare the folder again")
        self.offsets: list[list[int]] = at.tolist()  # Python integers are faster than numpy's one at a time

    def check_length(self) -> None:
        """Raise BadFileError if the file has been truncated: reading past its end would kill the process."""
        if self._map.size() < len(self._map):
            size = self._map.size()
            raise BadFileError(f"{self.name} was truncated to {size} bytes while it was read: copy it again")

    def count_spans(self, at: int) -> int:
        """Return the number of spans of a row. at: where the data of its spans member begins."""
        try:
            return _count_spans(bytes(self.data[at : at + NPY_HEADER_BYTES]))
        except ValueError as error:
            raise DataError(f"{self.name} has invalid spans ({error}): prepare the data again") from error

    def read_npy(self, at: int) -> np.ndarray:
        """Return a read-only view of the array of a member. at: where the data of the member begins."""
        header_end = at + 10 + int.from_bytes(self.data[at + 8 : at + 10], "little")
        try:
            shape, dtype = _parse_npy_header(bytes(self.data[at:header_end]))
            size = dtype.itemsize * int(np.prod(shape))
            return np.frombuffer(self.data[header_end : header_end + size], dtype=dtype).reshape(shape)
        except ValueError as error:
            raise DataError(f"{self.name} is corrupt ({error}): copy or prepare the folder again") from error


def _folder_fingerprint(index: dict) -> str:
    parts = [shard["sha256"] for shard in index["files"]] + [index["tokenizer"]["fingerprint"]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=64)
def _blank_row(seq_len: int, dtype: np.dtype, pad_token_id: int) -> tuple[np.ndarray, bytes]:
    """Return the npy header that the tokens of every row have, uint8, and the bytes of a whole row of padding."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.full(seq_len, pad_token_id, dtype=dtype), version=(1, 0), allow_pickle=False)
    member = buffer.getvalue()
    return np.frombuffer(member, dtype=np.uint8)[: len(member) - seq_len * dtype.itemsize], member


@lru_cache(maxsize=4096)  # few headers are distinct, and parsing one costs more than reading a row
def _count_spans(header: bytes) -> int:
    shape, dtype = _parse_npy_header(header)
    if dtype != np.int64 or len(shape) != 2 or shape[1] != len(SPAN_COLUMNS) or header[-1:] != b"\n":
        raise ValueError(f"{dtype} {shape}")
    return shape[0]


@lru_cache(maxsize=4096)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("pickled objects, which are never read")
    return shape, dtype

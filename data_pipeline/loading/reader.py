"""Read finished shard folders by row number, in any order. Files that differ from the index are never read."""

import contextlib
import errno
import hashlib
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.loading.integrity import BadFileError, check_file, check_index, check_length, check_size
from data_pipeline.loading.open_shard import OpenShard
from data_pipeline.loading.order import SHARDS_PER_BLOCK, RowOrder
from data_pipeline.loading.remote import RemoteFolder, ShardCache, is_remote
from data_pipeline.loading.row_reader import RowReader
from data_pipeline.shards.format import TOKENIZER_FOLDER, read_index

ON_BAD_SHARD = ("refuse", "skip")
# Per folder and process: a batch may span two blocks.
MAX_OPEN_SHARDS = 2 * SHARDS_PER_BLOCK
FETCHING_THREADS = 4  # per remote folder


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
        self.tokenizer_fingerprint = self.index["tokenizer"]["fingerprint"]
        self.rows_per_file: list[int] = [shard["rows"] for shard in self.index["files"]]
        self.num_rows = sum(self.rows_per_file)
        self.fingerprint = _folder_fingerprint(self.index)
        self._first_rows = np.concatenate([[0], np.cumsum(self.rows_per_file)])
        self._start_empty()
        self._check_sizes()

    @property
    def tokenizer_path(self) -> Path:
        return (self._remote.metadata if self._remote else self.path) / TOKENIZER_FOLDER

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

    def open_shard(self, shard: int) -> OpenShard | None:
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

    def _open_file(self, entry: dict) -> BufferedIOBase:
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
        rows = self.rows_per_file[shard]
        print(f"skipping a bad shard (on_bad_shard is skip): its {rows} rows get no labels: {error}", file=sys.stderr)

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

    def _open(self, shard: int) -> OpenShard:
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


def _folder_fingerprint(index: dict) -> str:
    parts = [shard["sha256"] for shard in index["files"]] + [index["tokenizer"]["fingerprint"]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()

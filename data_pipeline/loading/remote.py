"""Shard folders behind a URL, read through a local cache of bounded size.

Any number of processes of a machine may share the cache. Its files are named by their sha256, and a rename puts them there
whole. If space is needed, the least recently used files are deleted first. Files that a process has open are kept.
"""

import errno
import fcntl
import hashlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.loading.integrity import BadFileError, check_file, check_index
from data_pipeline.shards.format import INDEX_NAME, TOKENIZER_FOLDER, read_index

if TYPE_CHECKING:  # local folders should not pay for this import
    from fsspec import AbstractFileSystem

RETRY_SECONDS = (1, 4, 16)  # between attempts to read a file
REMOVALS = 5  # of the cache during one action, before that is an error
# The files of a cache; others are neither counted nor deleted. One that is being written has its final size in its name.
OWN_NAME = re.compile(r"[0-9a-f]{64}(?:\.(?P<size>\d+)(?:\.[\d-]+)?\.partial)?")
Result = TypeVar("Result")


def is_remote(path: str | os.PathLike) -> bool:
    """Tell whether a path is a URL, as in `s3://bucket/folder`."""
    return "://" in str(path)


def default_cache_folder() -> Path:
    """Return the user's folder for remote shards in the temporary folder, which is rarely on a network disk."""
    return Path(tempfile.gettempdir()) / f"lfm-shards-{os.getuid()}"


@dataclass(frozen=True)
class ShardCache:
    """A local cache of remote files.

    limit_bytes: files that processes have open are never deleted, so they can exceed this limit.
    """

    folder: Path = field(default_factory=default_cache_folder)
    limit_bytes: int = 50 * 10**9

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def create(self) -> None:
        """Create the folders. Raises DataError if that fails, or if they belong to another user."""
        try:
            for folder in (self.folder, self.files, self.folder / "locks"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot create the shard cache {self.folder} ({error.strerror}): name another folder"
            ) from error
        if self.folder.stat().st_uid != os.getuid():
            raise DataError(f"the shard cache {self.folder} belongs to another user: name another folder")

    def open(self, digest: str) -> BufferedIOBase | None:
        """Open the file with the given sha256 and mark it as used, or return None. It is kept while it is open."""
        path = self.files / digest
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(file.fileno())
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # it was deleted before this process got the lock
        return None

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock of the cache, against other processes of the machine and other threads of this process."""
        with (self.folder / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def surviving_removal(self, action: Callable[[], Result]) -> Result:
        """Do something with the cache. If its folder is removed meanwhile, create it and do it again.

        Raises DataError if that happens again and again.
        """
        for _ in range(REMOVALS):
            self.create()
            try:
                return action()
            except FileNotFoundError as error:
                fault = error
        raise DataError(
            f"the shard cache {self.folder} was removed while it was in use: choose a folder that nothing cleans up ({fault})"
        ) from fault

    def add(self, digest: str, size: int, write: Callable[[Path], None]) -> BufferedIOBase:
        """Reserve space, let `write` create a new file under a temporary name, and open it under its final name.

        Raises DataError if the file is larger than the limit of the cache, and FileNotFoundError if the cache was removed.
        """
        if size > self.limit_bytes:
            raise DataError(
                f"a file of {size} bytes does not fit into the shard cache {self.folder}, whose limit is "
                f"{self.limit_bytes}: raise the limit"
            )
        # If the cache was removed, another process may hold the same lock: the names of partial files must differ.
        partial = self.files / f"{digest}.{size}.{os.getpid()}-{threading.get_ident()}.partial"
        with self.locked("room"):
            self._delete_oldest(size)
            file = partial.open("w+b")
            fcntl.flock(file, fcntl.LOCK_EX)  # the lock shows that the file is being written
        try:
            write(partial)
            with self.locked("room"):  # no process can delete the file while its lock changes
                partial.rename(self.files / digest)
                fcntl.flock(file, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(file.fileno()), (self.files / digest).stat()):
                raise FileNotFoundError(errno.ENOENT, "removed and created anew while it was written", str(partial))
        except BaseException:
            partial.unlink(missing_ok=True)
            file.close()
            raise
        return file

    def _delete_oldest(self, room: int) -> None:
        files = []
        for path in self.files.iterdir():
            if not (own := OWN_NAME.fullmatch(path.name)):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process has just finished and renamed it
            size = int(own["size"] or status.st_size)
            files.append((status.st_mtime_ns, size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + room <= self.limit_bytes:
                return
            try:
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            except BlockingIOError:
                continue  # a process has it open
            except FileNotFoundError:
                pass
            total -= size


class RemoteFolder:
    """A finished shard folder behind a URL that fsspec understands.

    metadata: a local folder with its index and its tokenizer.
    Raises DataError if the folder cannot be reached, is unfinished or damaged, or needs a package that is not installed.
    """

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.url = url.rstrip("/")
        self.cache = cache
        cache.create()
        self._filesystem, self._root = _open_filesystem(self.url)
        self._metadata = cache.surviving_removal(self._fetch_metadata)

    @property
    def metadata(self) -> Path:
        if not self._metadata.is_dir():  # the cache was removed
            self._metadata = self.cache.surviving_removal(self._fetch_metadata)
        return self._metadata

    def open(self, entry: dict) -> BufferedIOBase:
        """Open the local copy of a file, downloading it if it is not in the cache. It is kept while it is open.

        Raises BadFileError if the file is missing, or if two downloads differ from the index. Raises DataError if the
        store cannot be reached.
        """
        return self.cache.open(entry["sha256"]) or self.cache.surviving_removal(lambda: self._fetch(entry))

    def _fetch(self, entry: dict) -> BufferedIOBase:
        digest = entry["sha256"]
        with self.cache.locked(digest[:2]):  # processes that wait here find the file in the cache afterwards
            if file := self.cache.open(digest):
                return file
            return self.cache.add(digest, entry["bytes"], lambda path: self._download_checked(entry, path))

    def name_of(self, entry: dict) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{entry['name']}"

    def discard(self, entry: dict) -> None:
        """Delete the local copy of a file, because it is damaged."""
        self.cache.create()  # somebody may have removed it
        with self.cache.locked(entry["sha256"][:2]):
            (self.cache.files / entry["sha256"]).unlink(missing_ok=True)

    def _fetch_metadata(self) -> Path:
        with (
            self.cache.locked("metadata"),
            tempfile.TemporaryDirectory(dir=self.cache.folder, ignore_cleanup_errors=True) as temporary,
        ):
            new = Path(temporary) / "folder"
            new.mkdir()
            try:
                self._download(INDEX_NAME, new / INDEX_NAME)
            except BadFileError:
                raise DataError(
                    f"there is no finished shard folder at {self.url} (no {INDEX_NAME}): copy a finished one there"
                ) from None
            index = read_index(new)
            check_index(self.url, index)
            # The hash of the index is in the folder's name, so the folder never changes while a process reads it.
            identity = hashlib.sha256(self.url.encode() + (new / INDEX_NAME).read_bytes()).hexdigest()
            folder = self.cache.folder / "folders" / identity[:32]
            if not folder.is_dir():
                (new / TOKENIZER_FOLDER).mkdir()
                for entry in index["tokenizer"]["files"]:
                    self._download_checked(entry, new / entry["name"])
                folder.parent.mkdir(exist_ok=True)
                new.rename(folder)
            return folder

    def _download_checked(self, entry: dict, target: Path) -> None:
        self._download(entry["name"], target)
        try:
            with target.open("rb") as file:
                check_file(file, self.name_of(entry), entry)
        except BadFileError:  # possibly damaged in transit, so try once more
            self._download(entry["name"], target)
            with target.open("rb") as file:
                check_file(file, self.name_of(entry), entry)

    def _download(self, name: str, target: Path) -> None:
        for pause in (*RETRY_SECONDS, None):
            try:
                return self._filesystem.get_file(f"{self._root}/{name}", str(target))
            except FileNotFoundError:
                if not target.parent.is_dir():
                    raise  # the cache was removed
                raise BadFileError(f"{self.url}/{name} is missing, but the index lists it: copy it there") from None
            except _network_errors() as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        f"the disk has no space for {name} in the shard cache {self.cache.folder}: free some"
                    ) from error
                if pause is None or isinstance(error, PermissionError):
                    raise DataError(
                        f"cannot read {self.url}/{name} ({' '.join(str(error).split())[:200] or type(error).__name__}): "
                        "check the network and the credentials"
                    ) from error
                time.sleep(pause)


def _open_filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(url)
    except ImportError as error:
        protocol = url.split("://")[0].replace("https", "http")
        fault = " ".join(str(error).split())
        raise DataError(f"cannot open {url} ({fault}): pip install 'fsspec[{protocol}]'") from error
    except ValueError as error:
        raise DataError(f"cannot open {url}: {' '.join(str(error).split())}") from error
    return filesystem, root.rstrip("/")


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that clients of stores raise if the network fails; some do not derive from OSError."""
    errors: list[type[BaseException]] = [OSError]
    for module, name in (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)

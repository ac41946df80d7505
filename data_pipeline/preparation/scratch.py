"""Files of unfinished work. They are whole or absent, and damage is detected when they are read."""

from __future__ import annotations

import json
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.format import PARTIAL_SUFFIX

WORK_NAME = ".work"


def work_folder(out: Path) -> Path:
    """Return the folder that holds the unfinished work until the index is written."""
    return out / WORK_NAME


def claims_folder(out: Path) -> Path:
    """Return the folder in which the members of a team claim units of work."""
    return work_folder(out) / "claims"


def write_scratch(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file of the unfinished work, whole or not at all.

    Arrays are not synced to disk: if a power cut damages one, reading it detects that, and it is made again.
    """
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            else:
                content(file)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the space
        raise


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a scratch file of arrays, whole or not at all.

    Raises `TypeError` for arrays of Python objects: every rerun would take such a file for a damaged one.
    """
    if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
        raise TypeError(f"{', '.join(objects)} hold Python objects, which a scratch file cannot store")
    # mypy takes the arrays for `allow_pickle`, which NumPy 2.0 does not have.
    write_scratch(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Read arrays from a scratch file. If the file is damaged, remove it and raise DataError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names or arrays.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        path.unlink(missing_ok=True)
        raise DataError(f"{path} was damaged and is removed: run again to create it anew ({error})") from error


def as_bytes(values: list) -> np.ndarray:
    """Return JSON values as an array of bytes. NumPy strings would each take the space of the longest one."""
    return np.frombuffer(json.dumps(values, ensure_ascii=False).encode(), dtype=np.uint8)


def from_bytes(array: np.ndarray) -> list:
    """Return the values of an array made by `as_bytes`."""
    return json.loads(array.tobytes())


def map_array(path: Path, beside: Path) -> np.ndarray:
    """Map a scratch file of one array into memory. If it is damaged, remove it and `beside`, and raise DataError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        for damaged in (beside, path):
            damaged.unlink(missing_ok=True)
        raise DataError(f"{path} was damaged and is removed: run again to create it anew ({error})") from error


def stamp(path: str | Path) -> int:
    """Return the modification time of a file or folder in ns, or 0 if it is missing; it makes stale caches miss."""
    return Path(path).stat().st_mtime_ns if Path(path).exists() else 0

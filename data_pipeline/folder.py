"""The output folder of `prepare`: who may write to it, what of it is ours, and whether it is done already."""

import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards import INDEX_NAME, PARTIAL_SUFFIX, TOKENIZER_FOLDER, read_index

LOCK_NAME = ".prepare.lock"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SHARD_FILES = re.compile(r"shard-\d+-\d+\.(tar|offsets\.npy)")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Creates the folder if needed and holds it for one process; another one waits until it is free.

    Raises DataError where the folder holds files that `prepare` did not make; they are not touched.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file: name a folder for the shards")
    # Whatever is there before the lock was not made by us. The lock is looked for last, because another process that
    # begins at this very moment makes it before all other files.
    foreign = next(out.iterdir(), None) if out.is_dir() else None
    if foreign and not (out / LOCK_NAME).exists():
        raise DataError(f"{out} holds {foreign.name}, which `prepare` did not make: name an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK_NAME).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {out}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def finished_index(out: Path, config: dict) -> dict | None:
    """Gives the index where this config has made the folder already, None where the folder is unfinished.

    Raises DataError where another config made it.
    """
    if not (out / INDEX_NAME).exists():
        return None
    index = read_index(out)
    differing = [key for key in config.keys() | index["config"].keys() if config.get(key) != index["config"].get(key)]
    if differing:
        key = min(differing)
        before, now = index["config"].get(key), config.get(key)
        raise DataError(
            f"{out} was prepared with {key} = {before} and now {key} = {now} is asked for: "
            "name another folder, or remove this one"
        )
    return index


def remove_unfinished(out: Path) -> None:
    """Removes what an interrupted run left; raises DataError, before it removes anything, where a file is not ours."""
    files = [path for path in out.rglob("*") if not path.is_dir()]
    for path in files:
        name = path.relative_to(out).as_posix().removesuffix(PARTIAL_SUFFIX)
        ours = (
            name in (LOCK_NAME, INDEX_NAME)
            or SHARD_FILES.fullmatch(name)
            or name in (f"{TOKENIZER_FOLDER}/{file}" for file in TOKENIZER_FILES)
        )
        if not ours:
            raise DataError(f"{out} holds {name}, which `prepare` did not make: move it away, or name another folder")
    for path in files:
        if path != out / LOCK_NAME:
            os.remove(path)

"""The output folder of `prepare`: its lock, which files `prepare` made, and whether it is finished."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.preparation.scratch import claims_folder, work_folder, write_scratch
from data_pipeline.shards.format import (
    INDEX_NAME,
    PARTIAL_SUFFIX,
    TOKENIZER_FOLDER,
    VALIDATION_FOLDER,
    files_of,
    read_index,
)

LOCK_NAME = ".prepare.lock"
CONFIG_NAME = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SHOWN_LENGTH = 300  # characters of a value in a message
SHARD_FILES = re.compile(r"shard-\d+-\d+\.(tar|offsets\.npy)")


@contextmanager
def locked(out: Path, shared: bool) -> Iterator[None]:
    """Create the folder if needed and lock it, for one process or `shared` by a team; other processes wait.

    Raises DataError if the folder has files that `prepare` did not make. They are not touched.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file: name a folder for the shards")
    # Files in a folder without the lock file are not from `prepare`. The lock file is checked last, because another
    # process that starts at the same time creates it before all other files.
    foreign = next(out.iterdir(), None) if out.is_dir() else None
    if foreign and not (out / LOCK_NAME).exists():
        raise DataError(f"{out} contains {foreign.name}, which `prepare` did not make: name an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with (out / LOCK_NAME).open("a") as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is preparing {out}", file=sys.stderr)
            fcntl.flock(lock, kind)
        yield


def finished_index(out: Path, config: dict) -> dict | None:
    """Return the index if the folder is finished, or None if it is unfinished.

    Raises DataError if the folder was made with another config.
    """
    return index_of(out, config) if (out / INDEX_NAME).exists() else None


def index_of(out: Path, config: dict) -> dict:
    """Return the index of a finished folder.

    Raises DataError if the folder is unfinished or was made with another config.
    """
    index = read_index(out)
    _check_same(index["config"], config, f"{out} was prepared")
    return index


def missing_file(out: Path, index: dict) -> str | None:
    """Return the name of a file of a finished folder that is missing or has another size than in the index, or None."""
    folders = [(out, index)]
    if index["counts"].get("validation_documents"):
        if not (out / VALIDATION_FOLDER / INDEX_NAME).exists():
            return f"{VALIDATION_FOLDER}/{INDEX_NAME}"
        folders.append((out / VALIDATION_FOLDER, read_index(out / VALIDATION_FOLDER)))
    for folder, its_index in folders:
        for entry in files_of(its_index):
            path = folder / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return path.relative_to(out).as_posix()
    return None


def begin_or_continue(out: Path, config: dict, alone: bool) -> None:
    """Make the folder ready for work with this config, keeping what an interrupted run with the same config finished.

    alone: no other process works on the folder, so partly written files can be removed.
    Raises DataError if `prepare` did not make one of the files, or if the work began with another config. Nothing has
    been removed then.
    """
    work = work_folder(out)
    begun = work / CONFIG_NAME
    if begun.exists():
        before = json.loads(begun.read_text())
        if before == config | {"on_bad_row": "refuse"}:
            write_scratch(begun, json.dumps(config).encode())  # what is finished has no bad row
        else:
            _check_same(before, config, f"{out} is unfinished and was begun")
    files = _own_files(out)
    if begun.exists():
        if alone:
            remove_partial_files(out)
            shutil.rmtree(claims_folder(out), ignore_errors=True)
        return
    # Without the config there is no telling how existing shards were made, so they are removed.
    if alone:
        for path in files:
            if path != out / LOCK_NAME:
                path.unlink()
    work.mkdir(exist_ok=True)
    write_scratch(begun, json.dumps(config).encode())


def remove_work(out: Path) -> None:
    """Remove the files that only an unfinished folder needs."""
    shutil.rmtree(work_folder(out), ignore_errors=True)
    remove_partial_files(out)


def remove_partial_files(out: Path) -> None:
    """Remove the partly written files of killed processes."""
    for folder, _, names in os.walk(out):  # os.walk ignores files that vanish meanwhile
        for name in names:
            if name.endswith(PARTIAL_SUFFIX):
                Path(folder, name).unlink(missing_ok=True)


def _check_same(before: dict, now: dict, made: str) -> None:
    differing = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
    if differing:
        key = min(differing)
        then, today = _shown(before.get(key), now.get(key))
        raise DataError(
            f"{made} with {key} = {then}, but {key} is now {today}: name another folder, or remove this one"
        )


def _shown(before: Any, now: Any) -> tuple[str, str]:
    """Return two different values as short texts. Of long lists, such as the files of a source, show what differs first."""
    if isinstance(before, list) and isinstance(now, list) and before and now:
        position = next((n for n, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), 0)
        if len(before) != len(now):
            return f"{len(before):,} entries", f"{len(now):,} entries"
        if len(now) > 1:
            before, now = ({f"entry {position + 1:,}": each[position]} for each in (before, now))
    return _shortened(str(before)), _shortened(str(now))


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"


def _own_files(out: Path) -> list[Path]:
    files = [path for path in out.rglob("*") if not path.is_dir() and work_folder(out) not in path.parents]
    for path in files:
        name = path.relative_to(out).as_posix()
        if not _is_ours(name.removeprefix(f"{VALIDATION_FOLDER}/")):
            raise DataError(
                f"{out} contains {name}, which `prepare` did not make: move it away, or name another folder"
            )
    return files


def _is_ours(name: str) -> bool:
    if name.endswith(PARTIAL_SUFFIX):
        name = name.removesuffix(PARTIAL_SUFFIX).rpartition(".")[0]  # drop the host and process id
    tokenizer_files = {f"{TOKENIZER_FOLDER}/{file}" for file in TOKENIZER_FILES}
    return name in (LOCK_NAME, INDEX_NAME) or name in tokenizer_files or bool(SHARD_FILES.fullmatch(name))

"""Folders whose every file is known: sizes and sha256 in a manifest that is written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.files import sync_folder
from launcher.files import replace_text

MANIFEST = "manifest.json"
FORMAT = 4  # 2 added the balancing bias; 3 the best metric and the skipped ranges; 4 the step last validated
READABLE_FORMATS = (2, 3, 4)
HASHING_THREADS = 8  # hashing releases the interpreter; more than this many at once only wait for the disk


def files_of(folder: Path) -> list[str]:
    """The names of all files below a folder, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def describe_durably(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Each file's size in bytes and sha256; when this returns, their contents are on the disk. Raises `OSError`."""
    described = {}
    for name in names:
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        described[name] = _describe(folder / name)
    return described


def write_manifest(folder: Path, manifest: dict) -> None:
    """Give a folder whose files are durable its manifest, durably, and with it the names of the files."""
    for below in folder.rglob("*/"):
        sync_folder(below)
    replace_text(folder / MANIFEST, json.dumps({**manifest, "format": FORMAT}))


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder."""
    return json.loads((folder / MANIFEST).read_text())


def find_fault(folder: Path) -> str | None:
    """Why a folder is not what its manifest says, or None; reads all of it."""
    if not (folder / MANIFEST).is_file():
        return f"{folder} has no {MANIFEST}"
    try:
        manifest = read_manifest(folder)
        files, written = manifest["files"], manifest["format"]
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if written not in READABLE_FORMATS:
        readable = " and ".join(map(str, READABLE_FORMATS))
        return f"another version of this code wrote it (format {written}; this one reads {readable})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for name, found in zip(files, pool.map(_describe, [folder / name for name in files]), strict=True):
            if found != files[name]:
                return f"the sha256 of {name} is not the manifest's"
    return None


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

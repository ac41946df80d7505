"""Describe every file of a folder by size and sha256, in a manifest that is written last."""

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
# Format 2 added the balancing bias, 3 the best metric and the skipped ranges, 4 the step last validated.
FORMAT = 4
READABLE_FORMATS = (2, 3, 4)
# Hashing releases the interpreter's lock; more threads than this only wait for the disk.
HASHING_THREADS = 8


def files_of(folder: Path) -> list[str]:
    """Return the names of all files below a folder, relative to it and sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def describe_durably(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Sync each file to the disk and return its size in bytes and its sha256, by name. Raises `OSError`."""
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
    """Write the manifest of a folder whose files are synced, and sync it and the folders' lists of names."""
    for below in folder.rglob("*/"):
        sync_folder(below)
    replace_text(folder / MANIFEST, json.dumps({**manifest, "format": FORMAT}))


def read_manifest(folder: Path) -> dict:
    """Read the manifest of a folder."""
    return json.loads((folder / MANIFEST).read_text())


def find_fault(folder: Path) -> str | None:
    """Return how a folder differs from its manifest, or None if it does not; reads every file."""
    if not (folder / MANIFEST).is_file():
        return f"{folder} has no {MANIFEST}"
    try:
        manifest = read_manifest(folder)
        files, written = manifest["files"], manifest["format"]
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if written not in READABLE_FORMATS:
        readable = " and ".join(map(str, READABLE_FORMATS))
        return f"another version of this code wrote it (format {written}; this version reads {readable})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for name, found in zip(files, pool.map(_describe, [folder / name for name in files]), strict=True):
            if found != files[name]:
                return f"the sha256 of {name} differs from the manifest"
    return None


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

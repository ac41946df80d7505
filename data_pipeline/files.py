"""Durable file operations."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

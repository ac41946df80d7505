"""File names that may hold any bytes: as text, and as what pyarrow opens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def as_text(name: str | Path) -> str:
    """Return a name or path as text; bytes that are not UTF-8 are shown as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def for_arrow(file: Path) -> str | BinaryIO:
    """Return the path of a file, or the open file if its name is not UTF-8, which pyarrow cannot open by name."""
    return str(file) if as_text(file) == str(file) else file.open("rb")

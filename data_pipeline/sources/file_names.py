"""Names of files as text, also if they are not valid UTF-8."""

from __future__ import annotations

import os
from pathlib import Path


def shown(name: str | Path) -> str:
    r"""Return a file's name with bytes that are not UTF-8 written as `\xNN`, so that it can be printed and stored."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")

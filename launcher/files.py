"""Replace text files atomically."""

import os
from pathlib import Path

from data_pipeline.files import sync_folder


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically and sync it: readers find the old content or the new one, even after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)

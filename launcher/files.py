"""Text files that are replaced as a whole."""

import os
from pathlib import Path

from data_pipeline.files import sync_folder


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one, never half of it."""
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

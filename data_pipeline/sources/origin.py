"""The note beside downloaded files that records their dataset and its revision."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.errors import DataError

NOTE = "dataset-origin.json"


def write_origin(folder: str | Path, dataset: str, revision: str) -> None:
    """Write the note into a folder. It holds for all files in it and in its subfolders."""
    (Path(folder) / NOTE).write_text(json.dumps({"dataset": dataset, "revision": revision}) + "\n", encoding="utf-8")


def origin_of(file: Path) -> dict[str, str]:
    """Return `dataset` and `revision` from the nearest note above a file, or an empty dict if there is none.

    Raises DataError if the note is damaged.
    """
    folder = file.parent.resolve()
    note = next((path for above in (folder, *folder.parents) if (path := above / NOTE).is_file()), None)
    if note is None:
        return {}
    try:
        found = json.loads(note.read_bytes())
        return {name: str(found[name]) for name in ("dataset", "revision")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{note} does not name `dataset` and `revision`: run `lfm fetch` again, or delete the file"
        ) from error

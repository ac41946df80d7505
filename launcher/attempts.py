"""`attempts.jsonl`: a line for each start of a run and for each end, so that what was changed between them is not lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path


def add_attempt(folder: Path, event: str, facts: dict) -> None:
    """Append a line: `begins` or `ended`, and what is known of it.

    Where the disk does not take it, a line on stderr says so: the run, or the error that ends it, is more important.
    """
    path = folder / "attempts.jsonl"
    try:
        with open(path, "a") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")
    except OSError as error:
        print(f"{path} could not be written ({error.strerror})", file=sys.stderr, flush=True)


def differences(before: dict, now: dict, prefix: str = "") -> dict[str, list]:
    """Where two descriptions of a run differ, as `{"section.key": [before, now]}`; None for a key that is not there."""
    found = {}
    for name in dict.fromkeys((*before, *now)):  # in their order
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found[f"{prefix}{name}"] = [old, new]
    return found


def code_version() -> dict:
    """The commit of this code, and whether files that it tracks were changed since; None where nothing is known."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit or None, "uncommitted_changes": None if changed is None else changed != ""}


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None

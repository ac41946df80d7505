"""Keep `attempts.jsonl`, with a line for each start and each end of a run and for what changed between starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path


def add_attempt(folder: Path, event: str, facts: dict) -> None:
    """Append a line with the event, `begins` or `ended`, and its facts.

    If it cannot be written, only warn on stderr: the run, or the error that ends it, is more important.
    """
    path = folder / "attempts.jsonl"
    try:
        with open(path, "a") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")
    except OSError as error:
        print(f"{path} could not be written ({error.strerror})", file=sys.stderr, flush=True)


def differences(before: dict, now: dict, prefix: str = "") -> dict[str, list]:
    """Return the differences of two run descriptions as `{"section.key": [before, now]}`; a missing key gives None."""
    found: dict[str, list] = {}
    for name in dict.fromkeys((*before, *now)):  # keeps their order
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found[f"{prefix}{name}"] = [old, new]
    return found


def code_version() -> dict:
    """Return this code's commit and whether tracked files were changed since; None for each if unknown."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit or None, "uncommitted_changes": None if changed is None else changed != ""}


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None

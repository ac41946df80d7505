"""Go back to an earlier checkpoint, only once per command and without losing the later checkpoints.

Later checkpoints are renamed to `left-step-N`, and `resume=left-step-N` resumes from one of them. `gone_back` in the run
folder holds the value of `resume` that was applied: a job that restarts with the same value resumes from the newest
checkpoint instead.
"""

from __future__ import annotations

from pathlib import Path

from launcher.files import replace_text
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import complete_checkpoints, step_of


def still_to_do(run: RunFolder, resume: str) -> tuple[str, list[str]]:
    """Return `resume`, or `auto` if an earlier start already went back, and messages for the user."""
    record = _record(run)
    if not record.exists() or record.read_text().strip() != resume:
        return resume, []
    note = f"resume={resume} was already applied by an earlier start, so the newest checkpoint is used; "
    return "auto", [note + f"to go back again, delete {record}"]


def go_back(run: RunFolder, checkpoint: Path, resume: str) -> tuple[Path, list[str]]:
    """Make `checkpoint` the newest of its run and record that `resume` was applied; return what `make_newest` does."""
    own, notes = make_newest(run, checkpoint)
    if resume in ("auto", "never"):
        _record(run).unlink(missing_ok=True)
    else:
        replace_text(_record(run), f"{resume}\n")
    return own, notes


def make_newest(run: RunFolder, checkpoint: Path) -> tuple[Path, list[str]]:
    """Make `checkpoint` the newest of its run, under its own name; return its folder and a message for each rename."""
    step = step_of(checkpoint)
    own = run.checkpoints / f"step-{step:08d}"
    notes = []
    for folder in complete_checkpoints(run):
        if folder != checkpoint and step_of(folder) >= step:
            aside = _free_name(folder)
            folder.rename(aside)
            notes.append(
                f"checkpoint {folder.name} was renamed to {aside.name}, because its step will be trained again"
            )
    if checkpoint.name != own.name:
        checkpoint.rename(own)
        notes.append(f"checkpoint {checkpoint.name} was renamed back to {own.name}")
    if not run.latest.exists() or run.latest.read_text().strip() != own.name:
        replace_text(run.latest, f"{own.name}\n")
    return own, notes


def _record(run: RunFolder) -> Path:
    return run.path / "gone_back"


def _free_name(folder: Path) -> Path:
    """Return an unused `left-...` name for a checkpoint, so that an earlier one of that name is kept."""
    aside, number = folder.with_name(f"left-{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"left-{folder.name}-{number}")
    return aside

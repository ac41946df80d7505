"""Going back to an earlier checkpoint: once, however often the same command starts again, and without losing later ones.

What comes after the checkpoint is set aside as `left-step-N`, from where `resume=left-step-N` goes on. `gone_back` in the
run folder holds the value of `resume` that was obeyed: a job that comes back with it goes on from the newest.
"""

from __future__ import annotations

from pathlib import Path

from launcher.files import replace_text
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import complete_checkpoints, step_in_name


def still_to_do(run: RunFolder, resume: str) -> tuple[str, list[str]]:
    """`resume`, or `auto` where an earlier start has gone back as it says; and what to tell the user of that."""
    record = _record(run)
    if not record.exists() or record.read_text().strip() != resume:
        return resume, []
    note = f"an earlier start has obeyed resume={resume} ({record} says so): going on from the newest checkpoint; "
    return "auto", [note + "to go back once more, delete that file"]


def go_back(run: RunFolder, checkpoint: Path, resume: str) -> tuple[Path, list[str]]:
    """Make `checkpoint` the newest of its run, and remember that `resume` was obeyed; returns as `make_newest`."""
    own, notes = make_newest(run, checkpoint)
    if resume in ("auto", "never"):
        _record(run).unlink(missing_ok=True)
    else:
        replace_text(_record(run), f"{resume}\n")
    return own, notes


def make_newest(run: RunFolder, checkpoint: Path) -> tuple[Path, list[str]]:
    """Make `checkpoint` the newest of its run, under its own name; returns where it is now, and what was renamed."""
    step = step_in_name(checkpoint.name)
    own = run.checkpoints / f"step-{step:08d}"
    notes = []
    for folder in complete_checkpoints(run):
        if folder != checkpoint and step_in_name(folder.name) >= step:
            aside = _free_name(folder)
            folder.rename(aside)
            notes.append(f"checkpoint {folder.name} is of steps that will be taken again: it is now {aside.name}")
    if checkpoint.name != own.name:
        checkpoint.rename(own)
        notes.append(f"checkpoint {checkpoint.name} is {own.name} again")
    if not run.latest.exists() or run.latest.read_text().strip() != own.name:
        replace_text(run.latest, f"{own.name}\n")
    return own, notes


def _record(run: RunFolder) -> Path:
    return run.path / "gone_back"


def _free_name(folder: Path) -> Path:
    """Where a checkpoint is set aside; one that was before under the same name stays, too."""
    aside, number = folder.with_name(f"left-{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"left-{folder.name}-{number}")
    return aside

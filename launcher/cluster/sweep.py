"""Sweeps: one array job with a run folder for each combination of values, and a table that compares the runs."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

from launcher.cluster.sbatch import Submission, check_setting, of_script, site_options
from launcher.errors import ConfigurationError
from launcher.training.monitoring import tags

LOSSES = {"train loss": tags.LOSS, "held-out loss": tags.HELD_OUT_CROSS_ENTROPY}


def sweep(
    settings: list[str], arguments: list[str], output: Path, site: dict[str, str], options: list[str]
) -> tuple[list[list[str]], Submission]:
    """Return the overrides of each run, and the array job that trains them.

    settings: `key=value,value` each; all combinations of their values are trained. output: the folder of all runs.
    Each submission has its own numbered folder of overrides, since tasks of an earlier sweep may not have read theirs yet.
    """
    keys, values = zip(*map(check_setting, settings), strict=True)
    runs = []
    for chosen in itertools.product(*values):
        overrides = [f"{key}={value}" for key, value in zip(keys, chosen, strict=True)]
        name = re.sub(r"[/\s]", "_", ",".join(overrides))
        runs.append([*overrides, f"output={output / name}"])
    job = of_script("train", arguments, site, [*options, f"--array=0-{len(runs) - 1}"])
    taken = [int(folder.name) for folder in (output / "sweep").glob("[0-9]*")]
    job.variables["LFM_SWEEP"] = str(output / "sweep" / str(max(taken, default=0) + 1))
    return runs, job


def write_runs(runs: list[list[str]], folder: Path) -> None:
    """Write a file for each run with one override per line; `slurm/train.sbatch` reads it by the array task's number.

    Raises `ConfigurationError` if another sweep has just created the folder.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigurationError(f"another lfm submit has just created {folder}; run this command again") from error
    for number, overrides in enumerate(runs):
        (folder / str(number)).write_text("".join(f"{override}\n" for override in overrides))


# sbatch options that a job needs to be accepted, as opposed to its resources.
ADMISSION = ("--account", "--partition", "--qos", "--reservation", "--clusters", "-A", "-p", "-q", "-M")


def table_job(output: Path, site: dict[str, str], array: str, given: list[str]) -> Submission:
    """Build the job that writes `table.md` when all runs of an array have ended, successful or not.

    given: the array's own options; those in `ADMISSION` also apply to this job.
    """
    command = shlex.join([sys.executable, "-m", "launcher.cli", "submit", "--table", str(output)])
    admitting = [word for word in given if word.startswith(ADMISSION)]
    options = [f"--dependency=afterany:{array}", "--job-name=lfm-table", "--ntasks=1", "--time=00:30:00"]
    return Submission([f"--wrap={command}"], [*site_options(site), *admitting, *options, "--output=%x-%j.out"])


def table(output: Path) -> str:
    """Return a Markdown table of a folder's sweeps, with the settings, state, step and last losses of each run.

    Raises `ConfigurationError` if the folder has no sweep.
    """
    files = sorted((output / "sweep").glob("[0-9]*/[0-9]*"), key=lambda file: (int(file.parent.name), int(file.name)))
    if not files:
        raise ConfigurationError(
            f"{output} is not the folder of a sweep (it has no sweep/1/0); name the output of lfm submit --sweep"
        )
    settings = {}  # by run folder, since the same sweep may be submitted several times
    for file in files:
        *overrides, place = file.read_text().splitlines()
        run = Path(place.removeprefix("output="))
        settings[run] = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    rows = [[values.get(key, "") for key in keys] + _facts(run) for run, values in settings.items()]
    lines = [[*keys, "state", "step", *LOSSES], ["---"] * (len(keys) + 2 + len(LOSSES)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _facts(run: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    status = run / "status.json"
    if not status.exists():
        return ["not started", *[""] * (1 + len(LOSSES))]
    facts = json.loads(status.read_text())
    losses = dict.fromkeys(LOSSES.values(), "")
    if (run / "tensorboard").is_dir():
        reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        reader.Reload()
        for tag in losses.keys() & reader.Tags()["scalars"]:
            losses[tag] = f"{reader.Scalars(tag)[-1].value:.4f}"
    return [facts["state"], str(facts["step"]), *losses.values()]

"""A sweep: one array job, a run folder for each combination of values, and one table of them all."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

from launcher.cluster.sbatch import Submission, check_setting, of_script, site_options
from launcher.errors import ConfigurationError

LOSSES = {"train loss": "train/loss", "held-out loss": "validation/cross_entropy"}


def sweep(
    settings: list[str], arguments: list[str], output: Path, site: dict[str, str], options: list[str]
) -> tuple[list[list[str]], Submission]:
    """The overrides of each run, and the array job that trains them.

    settings: `key=value,value` each; every value of one meets every value of the others. output: the folder of them all.
    What the tasks are to read is numbered by submission, for an earlier sweep's tasks may still wait to read theirs.
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
    """A file for each run with its overrides, a line each, which `slurm/train.sbatch` reads by the array task's number.

    Raises `ConfigurationError` where another sweep has taken the folder meanwhile.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigurationError(f"another lfm submit has just made {folder}; call this one again") from error
    for number, overrides in enumerate(runs):
        (folder / str(number)).write_text("".join(f"{override}\n" for override in overrides))


# What a job needs to be let in, unlike nodes, memory or time.
ADMISSION = ("--account", "--partition", "--qos", "--reservation", "--clusters", "-A", "-p", "-q", "-M")


def table_job(output: Path, site: dict[str, str], array: str, given: list[str]) -> Submission:
    """The job that writes `table.md` when all runs of an array have ended, well or not.

    given: the array's own options, of which those that let it in hold for this job, too.
    """
    command = shlex.join([sys.executable, "-m", "launcher.cli", "submit", "--table", str(output)])
    admitting = [word for word in given if word.startswith(ADMISSION)]
    options = [f"--dependency=afterany:{array}", "--job-name=lfm-table", "--ntasks=1", "--time=00:30:00"]
    return Submission([f"--wrap={command}"], [*site_options(site), *admitting, *options, "--output=%x-%j.out"])


def table(output: Path) -> str:
    """One line for each run of the sweeps in a folder, as Markdown: its settings, state, step and last losses.

    Raises `ConfigurationError` where the folder is no sweep's.
    """
    files = sorted((output / "sweep").glob("[0-9]*/[0-9]*"), key=lambda file: (int(file.parent.name), int(file.name)))
    if not files:
        raise ConfigurationError(
            f"{output} is no sweep's folder (it has no sweep/1/0); name the output of lfm submit --sweep"
        )
    settings = {}  # of each run folder, once: a sweep may be submitted again
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

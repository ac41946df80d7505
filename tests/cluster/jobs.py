"""Jobs on the virtual cluster, as a user sees them: sbatch, squeue, a log, a run folder."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cluster.virtual_cluster import NODES, VirtualCluster

STEPS = 24  # of the small run that the tests share
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
COMMAND_SECONDS = 30  # so that a SLURM command that hangs does not hang the suite


class Submitter:
    """Call `sbatch` in the project's folder, as a user would; `environment` is added to the shell's."""

    def __init__(self, cluster: VirtualCluster, project: Path, environment: dict[str, str]) -> None:
        self.cluster, self.project = cluster, project
        self.environment = {**cluster.environment, **environment}
        self.jobs: list[Job] = []

    def __call__(self, script: str, *arguments: str, options: list[str] = (), **environment: str) -> Job:
        """Submit `slurm/SCRIPT.sbatch` with `options` of sbatch."""
        command = ["sbatch", "--parsable", *options, f"slurm/{script}.sbatch", *arguments]
        name = next((option[11:] for option in options if option.startswith("--job-name=")), f"lfm-{script}")
        self.jobs.append(Job(self, self.slurm(*command, **environment).strip(), name))
        return self.jobs[-1]

    def slurm(self, *command: str, **environment: str) -> str:
        """Run a SLURM command, which must succeed, and return its output; `squeue` is retried if the controller is busy."""
        for _ in range(3):
            result = subprocess.run(
                command, env={**self.environment, **environment}, cwd=self.project, capture_output=True, text=True,
                timeout=COMMAND_SECONDS, check=False,
            )  # fmt: skip
            if command[0] != "squeue" or "timed out" not in result.stderr:
                break
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def urgent(self) -> Job:
        """Submit a short job that takes both nodes from the jobs that have them."""
        options = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent-%j.out", "--wrap=sleep 2"]
        self.jobs.append(Job(self, self.slurm("sbatch", "--parsable", *options).strip(), "urgent"))
        return self.jobs[-1]

    def clear(self) -> None:
        """Boot every node that is off, and cancel the jobs that have not ended."""
        for node in NODES:
            self.cluster.power_on_if_off(node)
        for job in self.jobs:
            if job.state() not in ENDED:
                self.slurm("scancel", job.number)
        self.cluster.wait_for_nodes()


class Job:
    """A submitted job: its log, its state, and methods that wait for either."""

    def __init__(self, submitter: Submitter, number: str, name: str) -> None:
        self._submitter, self.number = submitter, number
        self._log = submitter.project / f"{name}-{number}.out"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def state(self) -> str:
        """Return SLURM's state, such as RUNNING; for an array, that of a task which has not ended, else of a failed one."""
        command = ("squeue", "--noheader", "--states=all", f"--jobs={self.number}", "--format=%T")
        states = set(self._submitter.slurm(*command).split())
        return min(states, key=lambda state: (state in ENDED, state == "COMPLETED"))

    def wait_for(self, text: str, seconds: float = 120, since: int = 0) -> None:
        """Wait until the log has `text` after position `since`; fail if the job ends before that or takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            state, log = self.state(), self.log  # in this order: the log of an ended job is complete
            if text in log[since:]:
                return
            assert time.monotonic() < deadline, f"no {text!r} in {seconds} s in:\n{log}"
            assert state not in ENDED, f"no {text!r} in:\n{log}"
            time.sleep(0.2)

    def wait_until(self, *states: str, seconds: float = 180) -> str:
        """Wait until the job is in one of the given states of SLURM, and return that state."""
        deadline = time.monotonic() + seconds
        while (state := self.state()) not in states:
            assert time.monotonic() < deadline, f"{state} after {seconds} s:\n{self.log}"
            time.sleep(0.2)
        return state

    def minutes(self) -> int:
        """Return for how many whole minutes it has run."""
        *hours, minutes, _ = self._submitter.slurm(
            "squeue", "--noheader", f"--jobs={self.number}", "--format=%M"
        ).split(":")
        return 60 * int(hours[0] if hours else 0) + int(minutes)

    def finish(self) -> None:
        """Wait until the job has ended, and fail if it did not succeed."""
        assert self.wait_until(*ENDED) == "COMPLETED", self.log

    def scontrol(self, *changes: str) -> None:
        """Change the job, as an administrator does."""
        self._submitter.slurm("scontrol", "update", f"JobId={self.number}", *changes)


def read_status(run: Path) -> dict:
    """Return a run's `status.json`."""
    return json.loads((run / "status.json").read_text())


def curves(run: Path) -> dict[str, dict[int, float]]:
    """Return a run's TensorBoard curves, except those of speed, by tag and step; fail if a step has two points."""
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    shown = {}
    for tag in reader.Tags()["scalars"]:
        if not tag.startswith("perf/"):
            events = reader.Scalars(tag)
            shown[tag] = {event.step: event.value for event in events}
            assert len(shown[tag]) == len(events), f"{tag} has two points at one step"
    return shown


def ranks_of(run: str, *program: str) -> list[int]:
    """Return the process ids that train in a run folder, ordered by rank, on this machine and its virtual nodes.

    program: the words after `python`, if they are not those of the training.
    """
    program, ranks = [*(program or ("-u", "train.py"))], {}
    for process in Path("/proc").glob("[0-9]*"):
        arguments = _read(process / "cmdline")
        if arguments[1 : 1 + len(program)] == program and f"output={run}" in arguments:
            variables = dict(line.split("=", 1) for line in _read(process / "environ") if "=" in line)
            if "SLURM_PROCID" in variables:
                ranks[int(variables["SLURM_PROCID"])] = int(process.name)
    return [ranks[rank] for rank in sorted(ranks)]


def processes_of(job: Job) -> list[int]:
    """Return the processes of a job that still run."""
    processes = Path("/proc").glob("[0-9]*")
    return [int(process.name) for process in processes if f"SLURM_JOB_ID={job.number}" in _read(process / "environ")]


def _read(file: Path) -> list[str]:
    """Return the zero-terminated lines of a file in /proc; none if the process has ended."""
    try:
        return file.read_text(errors="replace").split("\0")
    except OSError:
        return []

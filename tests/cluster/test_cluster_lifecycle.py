"""What the batch scripts ask of SLURM, as its commands hear it; test_cluster_train.py has SLURM answer."""

import os
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
NAMES = {
    "a job": ({}, "7"),
    # One task of an array has the array's own number, and what names that number means all tasks.
    "an array's task": ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
}


@pytest.fixture
def commands(tmp_path):
    """Runs a line of bash after `source slurm/lifecycle.sh`; gives its exit code and the calls of SLURM's commands."""

    def run(line: str, state: str = "RUNNING", **variables: str) -> tuple[int, list[str]]:
        for name, answer in (("squeue", state), ("scontrol", "")):
            (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/called\necho {answer}\n')
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
        command = ["bash", "-c", f"set -euo pipefail; source slurm/lifecycle.sh; {line}"]
        result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=20)
        return result.returncode, (tmp_path / "called").read_text().splitlines()

    return run


@pytest.mark.parametrize(("variables", "name"), NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("line", ["suspects=(node1); requeue", "hold"])
def test_a_job_speaks_of_itself_alone(commands, line, variables, name):
    code, called = commands(line, **variables)
    assert code == 0
    words = {word.rpartition("=")[2] for call in called for word in call.split() if "7" in word}
    assert words == {name}, called


def test_a_cancelled_job_does_not_come_back(commands):
    code, called = commands("code=5; requeue", state="COMPLETING")
    assert code == 5
    assert not [call for call in called if call.startswith("scontrol")]

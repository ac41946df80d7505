"""The calls that the batch scripts make to SLURM's commands; in test_cluster_train.py a real SLURM answers them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
NAMES = {
    "a job": ({}, "7"),
    # One task of an array has the array's own job number, but in SLURM's commands that number means all tasks.
    "an array's task": ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
}


def stand_in(folder: Path, **scripts: str) -> dict[str, str]:
    """Return an environment in which these shell scripts replace SLURM's commands."""
    for name, script in scripts.items():
        (folder / name).write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LFM_", "SLURM_"))}
    return environment | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "LFM_VENV": sys.prefix}


@pytest.fixture
def commands(tmp_path):
    """Run a line of bash after `source slurm/lifecycle.sh`; return its exit code and the calls of SLURM's commands."""

    def run(line: str, squeue: str = "echo RUNNING", scontrol: str = "", **variables: str) -> tuple[int, list[str]]:
        answers = {"squeue": squeue, "scontrol": scontrol, "sleep": ""}
        scripts = {name: f'echo {name} "$@" >>{tmp_path}/called\n{answer}' for name, answer in answers.items()}
        environment = stand_in(tmp_path, **scripts) | variables
        command = ["bash", "-c", f"set -euo pipefail; source slurm/lifecycle.sh; {line}"]
        result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=20)
        return result.returncode, (tmp_path / "called").read_text().splitlines()

    return run


@pytest.mark.parametrize(("variables", "name"), NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("line", ["suspects=(node1); requeue", "hold"])
def test_a_job_or_an_arrays_task_names_only_itself(commands, line, variables, name):
    code, called = commands(line, **variables)
    assert code == 0
    words = {word.rpartition("=")[2] for call in called for word in call.split() if "7" in word}
    assert words == {name}, called


@pytest.mark.parametrize("line", ["requeue", "hold"])
def test_a_cancelled_job_is_not_requeued(commands, line):
    code, called = commands(f"code=5; {line}", squeue="echo COMPLETING")
    assert code == 5
    assert not [call for call in called if call.startswith("scontrol")]


@pytest.mark.parametrize(
    ("facts", "asked"),
    [
        ("StartTime=2026-01-31T12:00:00 PreemptTime=2026-01-31T12:30:00", "TERM"),
        ("StartTime=2026-01-31T12:00:00 PreemptTime=2026-01-31T11:30:00", ""),  # an earlier start was preempted
        ("StartTime=2026-01-31T12:00:00 PreemptTime=None", ""),
        ("", ""),
    ],
)
def test_a_preemption_that_only_the_ranks_were_told_of_is_recognised(commands, facts, asked):
    line = f"run_step bash -c 'exit 143'; [[ $code == 143 && $asked == '{asked}' ]]"
    code, called = commands(line, scontrol=f"echo 'JobId=7 {facts} EndTime=Unknown'")
    assert code == 0
    assert [call.split()[:3] for call in called if call.startswith("scontrol")] == [["scontrol", "show", "job"]]


@pytest.mark.parametrize(
    ("error", "code", "tries"),
    [
        ("slurm_requeue error: Socket timed out on send/recv operation", 0, 3),
        ("Requested operation is disabled", 75, 1),
    ],
)
def test_a_controller_that_does_not_answer_is_asked_again(commands, tmp_path, error, code, tries):
    third = f"[ $(grep -c requeue {tmp_path}/called) = 3 ]"
    ended, called = commands("requeue", scontrol=f"{third} || {{ echo '{error}' >&2; exit 1; }}")
    assert ended == code
    assert len([call for call in called if call.startswith("scontrol requeue")]) == tries


@pytest.mark.parametrize("line", ["requeue", "hold"])
def test_a_requeue_whose_answer_was_lost_counts_as_done(commands, tmp_path, line):
    first = f"[ $(grep -c 'scontrol requeue' {tmp_path}/called) = 1 ]"
    errors = f"if {first}; then echo 'Socket timed out'; else echo 'Job is pending execution for job 7'; fi >&2; exit 1"
    code, called = commands(line, scontrol=errors)
    assert code == 0
    assert len([call for call in called if call.startswith("scontrol requeue")]) == 2


def test_a_signal_that_srun_dropped_is_sent_again(commands):
    """The step requests the signal, ignores the first one, and would otherwise run for ever."""
    hears = "trap '[[ -n ${heard:-} ]] && exit 9; heard=1' USR1; kill -USR1 $PPID; while :; do /bin/sleep 0.1; done"
    code, _ = commands('run_step bash -c "$HEARS"; squeue; [[ $code == 9 && $asked == USR1 ]]', HEARS=hears)
    assert code == 0


def test_a_signal_before_the_step_is_known_reaches_it(commands):
    """The signal arrives just before srun starts, and srun misses the first one that is sent."""
    asks = "trap '[[ $BASH_COMMAND != code=0 || -n $asked ]] || ask_to_stop USR1' DEBUG"
    # Signals keep coming, as fast as the stand-in for `sleep` allows, even while Python would shut down.
    hears = "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: os._exit(9)); time.sleep(10)"
    line = f'set -T; {asks}; run_step {sys.executable} -c "$HEARS"; trap - DEBUG; squeue; [[ $code == 9 ]]'
    code, _ = commands(line, HEARS=hears)
    assert code == 0


def test_a_commands_warnings_are_no_part_of_its_answer(commands):
    _, called = commands("requeue", squeue="echo 'ERROR: ld.so: object cannot be preloaded' >&2; echo CANCELLED")
    assert not [call for call in called if call.startswith("scontrol")]


def test_a_step_that_was_asked_to_stop_before_it_began_is_no_success(commands):
    code, _ = commands("ask_to_stop USR1; run_step true; squeue; [[ $code == 138 ]]")
    assert code == 0


def test_ranks_get_the_scripts_variables_if_the_job_was_submitted_with_export_none(tmp_path):
    environment = stand_in(tmp_path) | {"SLURM_EXPORT_ENV": "NONE"}
    command = ["bash", "-c", "set -euo pipefail; source slurm/environment.sh; env"]
    shown = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    assert "SLURM_EXPORT_ENV=ALL" in shown.stdout.splitlines()


SRUN = """#!/bin/bash
echo srun "$@" >>{folder}/called
[[ $* != *train.py* ]] || exit 3
while [[ $1 != --save ]]; do shift; done
[[ -z '{report}' ]] || echo '{report}' >"$2"
exit {code}
"""


@pytest.mark.parametrize(
    ("report", "code", "begins", "ends"),
    [
        ("", 137, True, 3),  # a rank was killed, or a connection lost
        ("", 1, True, 3),  # a traceback
        ('{"level": "green", "suspects": []}', 0, True, 3),
        ('{"level": "red", "suspects": null}', 1, False, 1),
        ('{"level": "red", "suspects": ["node2"]}', 1, False, 0),
    ],
)
def test_preflight_ends_a_job_for_wrong_settings_and_requeues_it_for_broken_nodes(tmp_path, report, code, begins, ends):
    scontrol = f'echo scontrol "$@" >>{tmp_path}/called\nprintf "%s\\n" localhost node2'
    srun = SRUN.format(folder=tmp_path, report=report, code=code)
    environment = stand_in(tmp_path, srun=srun, squeue="echo RUNNING", scontrol=scontrol) | {
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
    }
    command = ["bash", "slurm/train.sbatch", f"output={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == ends, result.stderr
    called = (tmp_path / "called").read_text()
    assert ("train.py" in called) == begins
    assert ("scontrol requeue 7" in called) == (ends == 0)
    assert ("ExcNodeList=RUNNING,node2" in called) == (ends == 0)
    assert ("in all it excludes RUNNING,node2;" in result.stdout) == (ends == 0)


@pytest.mark.parametrize("out", ["--out {}", "--out={}"])
def test_a_preparation_without_progress_is_held(tmp_path, out):
    """Each start is asked to stop; only the third and the fourth have made progress."""
    folder = tmp_path / "shards"
    (folder / ".work").mkdir(parents=True)
    srun, scontrol = "kill -USR1 $PPID\nexec /bin/sleep 5", f'echo "$1" >>{tmp_path}/called'
    environment = stand_in(tmp_path, srun=srun, squeue="echo RUNNING", scontrol=scontrol, sleep="")
    environment |= {"SLURM_SUBMIT_DIR": str(PROJECT), "SLURM_JOB_NODELIST": "node1"}
    for start in range(8):
        if start in (2, 3):
            (folder / ".work" / f"unit-{start}").touch()
        (folder / ".work" / f"x.host-{start}.partial").touch()
        command = ["bash", "slurm/prepare.sbatch", "sample", *out.format(folder).split()]
        result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
    called = (tmp_path / "called").read_text().split()
    assert called == ["requeue"] * 5 + ["requeuehold"] + ["requeue"] * 2

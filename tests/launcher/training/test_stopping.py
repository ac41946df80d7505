"""Signals to the ranks, to the real `deepspeed` launcher, and a kill of one rank."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from launcher.environment import free_port
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import find_checkpoint, read_train_state
from tests import fork_server

ENDLESS = ["max_steps=100000", "checkpoint_every=100000", "schedule.steps=20", "expert_parallel_size=2"]
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_endless_run_stays():
    """Kill what a failed test leaves running, because it would slow down all later tests."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


def start_launcher(trainer, output: str, *overrides: str) -> subprocess.Popen:
    """Start `deepspeed --num_gpus 2 train.py` in a process group of its own, and wait for its first step."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "train.py"]
    command += trainer.arguments(output, *ENDLESS, *overrides)
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    return start_and_wait(command, environment, "step 1/")


def start_and_wait(command: list[str], environment: dict[str, str], beginning: str) -> subprocess.Popen:
    """Start a process in a group of its own, and wait until it prints a line with this beginning."""
    start = fork_server.Popen if command[0] == sys.executable else subprocess.Popen
    process = start(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    STARTED.append(process)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(beginning):
            return process
    raise AssertionError("".join(printed))


def members(group: int) -> list[psutil.Process]:
    """Return the processes of a group that have not ended; their `info` has the command line."""
    found = []
    for process in psutil.process_iter(["status", "cmdline", "create_time"]):  # they may end meanwhile
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def wait_for_the_end(group: int, seconds: float) -> None:
    """Wait until the last process of a group has ended; fail if one is left."""
    started = time.monotonic()
    while left := [process.info["cmdline"] for process in members(group)]:
        if time.monotonic() - started > seconds:
            os.killpg(group, signal.SIGKILL)
            raise AssertionError(f"left after {seconds} s: {left}")
        time.sleep(0.2)


def check_that_it_stopped_whole(folder) -> int:
    """Check that a run stopped with a whole checkpoint, and return the step."""
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "signal")
    checkpoint, passed_over = find_checkpoint(RunFolder(folder), "auto")
    assert passed_over == [] and read_train_state(checkpoint).step == status["step"]
    return status["step"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_launchers_group_stops_with_a_whole_checkpoint_and_no_orphan(trainer, number):
    """Ctrl-C sends an INT to the group, and then the launcher sends a TERM to each rank."""
    name = f"launcher_{number.name}"
    process = start_launcher(trainer, name)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    wait_for_the_end(process.pid, 40)
    assert process.returncode != 0
    check_that_it_stopped_whole(trainer.folder / name)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_the_end_of_the_launcher_alone_stops_its_ranks_with_a_checkpoint(trainer, number):
    """The signal goes only to the launcher, as with `kill`: it ends at once and does not signal its ranks."""
    name = f"launcher_alone_{number.name}"
    process = start_launcher(trainer, name)
    os.kill(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    wait_for_the_end(process.pid, 40)
    assert process.returncode == -number
    assert "the deepspeed launcher has ended: stopping with a checkpoint" in printed
    check_that_it_stopped_whole(trainer.folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_under_the_launcher_leaves_no_orphan(trainer, rank):
    process = start_launcher(trainer, f"launcher_killed_{rank}")
    of_the_rank = [member for member in members(process.pid) if f"--local_rank={rank}" in member.info["cmdline"]]
    # The oldest one: the others are children that live for a moment.
    min(of_the_rank, key=lambda member: member.info["create_time"]).kill()
    process.communicate(timeout=90)
    wait_for_the_end(process.pid, 40)
    assert process.returncode != 0


def one_rank(trainer, name: str, fault: dict) -> subprocess.Popen:
    """Start one process, and wait until its fault has begun."""
    arguments = trainer.arguments(name, *ENDLESS)
    command = [
        sys.executable,
        "-m",
        "fault_worker",
        json.dumps(arguments),
        json.dumps({"faults": [fault]}),
    ]
    folder = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(folder)), folder])}
    return start_and_wait(command, environment, f"{fault['kind']} begins")


@pytest.mark.slow
def test_interrupt_and_termination_at_once_are_one_request(trainer):
    """The step takes four seconds, so both signals come before its end; it is finished and saved."""
    process = one_rank(trainer, "both", {"kind": "sleep", "steps": [2], "seconds": 4})
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # within two seconds: the same Ctrl-C
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert check_that_it_stopped_whole(trainer.folder / "both") == 3


@pytest.mark.slow
def test_a_closed_terminal_stops_a_run_with_a_checkpoint(trainer):
    process = one_rank(trainer, "hung_up", {"kind": "sleep", "steps": [2], "seconds": 1})
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert check_that_it_stopped_whole(trainer.folder / "hung_up") == 3


@pytest.mark.slow
def test_a_second_interrupt_ends_a_hanging_run_at_once(trainer):
    process = one_rank(trainer, "twice", {"kind": "hang", "steps": [2]})
    process.send_signal(signal.SIGINT)
    time.sleep(4)  # too long for both to count as one interrupt
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted twice: stopping at once, without a checkpoint" in printed
    status = json.loads((trainer.folder / "twice" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "interrupted twice")


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_next_start_has_the_undisturbed_curve(trainer):
    common = ["max_steps=8", "checkpoint_every=3", "expert_parallel_size=2"]
    results = trainer.run_with_faults(
        2, trainer.arguments("killed", *common), [{"kind": "kill", "rank": 1, "steps": [5]}]
    )
    assert results[1].returncode == -signal.SIGKILL
    assert results[0].returncode == 77, results[0].stdout  # it ended by itself; a killed one has -9
    host = socket.gethostname()
    sentence = f"error: rank 1 on {host} ended without a word: killed"
    assert results[0].stdout.splitlines()[-1].startswith(sentence) and "Traceback" not in results[0].stdout
    status = json.loads((trainer.folder / "killed" / "status.json").read_text())
    assert (status["state"], status["step"], status["suspects"]) == ("failed", 5, [host])
    (output, _) = trainer.run(2, trainer.arguments("killed", *common), trainer.arguments("whole", *common))
    assert "resuming from" in output.stdout and "step-00000003" in output.stdout
    killed, whole = (trainer.scalars(name)["train/loss"] for name in ("killed", "whole"))
    assert killed == whole and set(whole) == set(range(1, 9))

"""Ranks that are forked from a process with all imports done: they start in one second instead of ten."""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

import launcher.training.resilience.failures
import train
from launcher.environment import free_port
from launcher.errors import one_sentence_errors
from launcher.training.resilience.failures import recognised_failures
from launcher.training.resilience.leaving import end_process, leave_together

RANKS = 2
PR_SET_CHILD_SUBREAPER = 36  # processes that the ranks leave behind become children of this one
LONGEST_END = 60.0  # seconds; the last rank must end by itself this soon after the first
LAST_ENDS = 10.0  # seconds; processes that the ranks started must end this soon after them
LAUNCHER_WAITS = 10.0
LONGEST_RUN = 200.0


def train_forked(
    arguments: list[str], outputs: list[Path], before: Callable[[int], None], launched: bool = False
) -> tuple[list[int], float]:
    """Train on two ranks; `before` is called in each with its number.

    launched: whether the remaining ranks get a TERM LAUNCHER_WAITS seconds after the first end, as launchers send it.
    Without it, ranks that wait for one that died before joining them never learn of its death.
    Return the exit codes and the seconds between the first end and the last. Fail if a rank does not end by itself or
    leaves a process behind.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    processes, port = {}, free_port()
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            _train_as(rank, port, arguments, outputs[rank], before)
        processes[pid] = rank
    return _wait_for_all(processes, launched)


def _train_as(rank: int, port: int, arguments: list[str], output: Path, before: Callable[[int], None]) -> NoReturn:
    """Train and exit as train.py does, so that a hang at the end of the process happens here as well."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    launcher.training.resilience.failures.GRACE = 3.0  # both ranks are on this machine
    before(rank)
    with one_sentence_errors(), recognised_failures():
        code = train.main(arguments)
        leave_together()
    end_process(code)


def _wait_for_all(processes: dict[int, int], launched: bool) -> tuple[list[int], float]:
    codes, first, started = {}, None, time.monotonic()
    while len(codes) < len(processes):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in processes:
            codes[processes[pid]] = os.waitstatus_to_exitcode(status)
            first = first or time.monotonic()
        now = time.monotonic()
        if launched and first and now - first > LAUNCHER_WAITS:
            launched = False
            for left in psutil.Process().children():
                left.terminate()
        if now - started > LONGEST_RUN or (first and now - first > LONGEST_END):
            for left in psutil.Process().children(recursive=True):
                left.kill()
            raise AssertionError(f"only {codes} (exit codes by rank) ended by themselves")
        if pid == 0:
            time.sleep(0.02)
    seconds = time.monotonic() - first
    deadline = time.monotonic() + LAST_ENDS
    while _has_children():
        assert time.monotonic() < deadline, "the ranks left a process behind"
        time.sleep(0.02)
    return [codes[rank] for rank in sorted(codes)], seconds


def _has_children() -> bool:
    """Reap the children that have ended, and return whether any other is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True

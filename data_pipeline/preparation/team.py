"""Sharing the work on one folder among local processes, MPI ranks or the tasks of a SLURM array.

- Every unit of work produces a file. If the file exists, the unit is done.
- A member of a team claims a unit by creating another file, and continues until no unit is unclaimed. So members may
  start late, or never.
- An old claim expires, because the member that made it may have died.
- Doing a unit twice is harmless: the bytes are the same, and files appear whole.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from data_pipeline.errors import DataError

POLL_SECONDS = 0.1
PARENT_DEATH = 1  # PR_SET_PDEATHSIG


class FinishedElsewhere(Exception):
    """Another member completed the folder and removed the work files."""


@dataclass(frozen=True)
class Member:
    """Member `index` of `count`; `patience`: seconds after which another member's claim expires."""

    index: int = 0
    count: int = 1
    patience: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"member {self.index} of {self.count}")


ALONE = Member()


class Team:
    """One member's worker processes, and its coordination with the other members.

    workers: number of processes; with 1 the work is done in this process.
    finished: the file whose existence means that all work is done.
    claims: the folder of the claims.
    """

    def __init__(self, member: Member, workers: int, finished: Path, claims: Path) -> None:
        self.member, self.workers, self.finished, self.claims = member, workers, finished, claims
        self._pool: ProcessPoolExecutor | None = None
        self._held: set[Path] = set()

    @contextmanager
    def at_work(self) -> Iterator[Team]:
        """Start the processes and end them with the block. If the block fails, release this member's claims."""
        try:
            with self._processes():
                yield self
        except BaseException:
            for claim in self._held:
                claim.unlink(missing_ok=True)
            raise

    @contextmanager
    def _processes(self) -> Iterator[None]:
        if self.workers == 1:
            yield
            return
        with _environment(POLARS_MAX_THREADS="1", OMP_NUM_THREADS="1"), _without_interrupts():
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)
            )
            # Start all workers now: they import their libraries while this process continues.
            for _ in range(self.workers):
                self._pool.submit(os.getpid)
        try:
            yield
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            processes = list((self._pool._processes or {}).values())
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
            raise
        self._pool.shutdown()

    def do(self, function: Callable, arguments: tuple, results: Sequence[Path], done: Callable) -> None:
        """Call `function(*arguments, number)` for every number whose result is missing, here or by other members.

        done: called with the number of each unit, and with the function's return value, or None if another member did
        the unit.
        Raises FinishedElsewhere if another member completed the folder, and whatever the function raises.
        """
        waiting = set(range(len(results)))
        while waiting:
            for number in [number for number in sorted(waiting) if results[number].exists()]:
                waiting.discard(number)
                done(number, None)
            idle = True
            for number, value in self._run(function, arguments, self._unclaimed(waiting, results)):
                waiting.discard(number)
                done(number, value)
                idle = False
            if waiting and idle:
                if self.finished.exists():
                    raise FinishedElsewhere
                time.sleep(POLL_SECONDS)

    def do_once(self, function: Callable, arguments: tuple, result: Path) -> None:
        """Do a single unit of work in this process, or wait until another member has done it."""
        here = Team(self.member, 1, self.finished, self.claims)
        here._held = self._held
        here.do(lambda *given: function(*given[:-1]), arguments, [result], lambda number, value: None)

    def _unclaimed(self, waiting: set[int], results: Sequence[Path]) -> Iterator[int]:
        """Claim units lazily and yield them: this member's share first, then units that others left."""
        index, count = self.member.index, self.member.count
        for number in sorted(waiting, key=lambda number: ((number - index) % count, number)):
            if count > 1 and self.finished.exists():
                raise FinishedElsewhere
            if not results[number].exists() and self._claim(results[number].name):
                yield number

    def _claim(self, name: str) -> bool:
        if self.member.count == 1:
            return True
        self.claims.mkdir(exist_ok=True)
        claim = self.claims / name
        try:
            claim.open("x").close()
        except FileExistsError:
            # The holder of an old claim may have died. If it is only slow, the unit is done twice, which is harmless.
            if time.time() - _time_of(claim) < self.member.patience:
                return False
            claim.touch()
        self._held.add(claim)
        return True

    def _run(self, function: Callable, arguments: tuple, numbers: Iterator[int]) -> Iterator[tuple[int, object]]:
        try:
            if self._pool is None:
                for number in numbers:
                    yield number, function(*arguments, number)
            else:
                yield from self._run_in_pool(self._pool, function, arguments, numbers)
        except FileNotFoundError:
            if self.finished.exists():
                raise FinishedElsewhere from None
            raise

    def _run_in_pool(
        self, pool: ProcessPoolExecutor, function: Callable, arguments: tuple, numbers: Iterator[int]
    ) -> Iterator[tuple[int, object]]:
        running: dict[Future, int] = {}
        try:
            while True:
                # Two units per process: one running, and one queued so that no process waits.
                while len(running) < 2 * self.workers and (number := next(numbers, None)) is not None:
                    running[pool.submit(function, *arguments, number)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process of this job was killed, probably for lack of memory: run again with fewer --workers or more "
                "memory; finished work is kept"
            ) from error


def _time_of(claim: Path) -> float:
    try:
        return claim.stat().st_mtime
    except FileNotFoundError:
        return time.time()  # released just now: the next poll can claim it


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore SIGINT within the block, so that processes started in it ignore Ctrl-C from their first moment.

    Ctrl-C reaches all processes of a terminal, but only the parent may react to it, by ending its workers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_worker(parent: int) -> None:
    if sys.platform == "linux":
        # A killed parent cannot end its workers, and they would wait for work forever.
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the processes that are started within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

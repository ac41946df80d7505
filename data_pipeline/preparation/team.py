"""Who does the work: the processes of this machine, MPI ranks or the tasks of a SLURM array, all on one folder.

A unit of work leaves a file; where the file is, the unit is done, whoever did it. A member of a team claims a unit by
another file, and does units, with as many processes as it may, as long as there is one that nobody claims; so members
may come late, or never. A claim that is old counts no more: who made it may have died. Doing a unit twice is harmless,
for its bytes are the same and files appear whole.
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
    """Another member has completed the folder, and the files of the work are gone."""


@dataclass(frozen=True)
class Member:
    """Member `index` of `count`; `patience`: seconds after which another member's claim counts no more."""

    index: int = 0
    count: int = 1
    patience: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"member {self.index} of {self.count}")


ALONE = Member()


class Team:
    """One member's processes, and its view of the others.

    finished: the file that says that all work is done. claims: the folder of the claims. workers: processes; with 1 the
    work is done in this process.
    """

    def __init__(self, member: Member, workers: int, finished: Path, claims: Path) -> None:
        self.member, self.workers, self.finished, self.claims = member, workers, finished, claims
        self._pool: ProcessPoolExecutor | None = None
        self._held: set[Path] = set()

    @contextmanager
    def at_work(self) -> Iterator[Team]:
        """Start the processes, and end them with the block; what it claimed and did not do others may have then."""
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
            # All of them now: they import their libraries while this process goes on.
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
        """Have `function(*arguments, number)` called for every number whose result is not there, by anyone.

        done: called with the number of a unit, and with what the function returned where it was done here, else None.
        Raises FinishedElsewhere where the work has come to its end meanwhile, and what the function raises.
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
        """Have a single piece of work done in this process, or wait until another member has done it."""
        here = Team(self.member, 1, self.finished, self.claims)
        here._held = self._held
        here.do(lambda *given: function(*given[:-1]), arguments, [result], lambda number, value: None)

    def _unclaimed(self, waiting: set[int], results: Sequence[Path]) -> Iterator[int]:
        """Claim and give units, one when it is asked for: this member's share first, then what others leave."""
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
            # Its holder may have died, or its unit takes long: then it is done twice, and does no harm.
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
                yield from self._run_in_pool(function, arguments, numbers)
        except FileNotFoundError:
            if self.finished.exists():
                raise FinishedElsewhere from None
            raise

    def _run_in_pool(
        self, function: Callable, arguments: tuple, numbers: Iterator[int]
    ) -> Iterator[tuple[int, object]]:
        running: dict[Future, int] = {}
        try:
            while True:
                # Two units for each process: one at work, one to begin with at once.
                while len(running) < 2 * self.workers and (number := next(numbers, None)) is not None:
                    running[self._pool.submit(function, *arguments, number)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process of this job was killed, often for want of memory: give fewer --workers, or more memory, and "
                "run again; what is done is kept"
            ) from error


def _time_of(claim: Path) -> float:
    try:
        return claim.stat().st_mtime
    except FileNotFoundError:
        return time.time()  # given up this very moment: the next look finds it free


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, from their first moment on: it reaches all of a terminal's otherwise.

    They inherit that it is ignored; the parent, which ends them, does so only meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set, none is Python's to be inherited
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_worker(parent: int) -> None:
    if sys.platform == "linux":
        # A parent that is killed cannot end its workers, and they would wait for work for ever.
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables that processes started meanwhile inherit."""
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

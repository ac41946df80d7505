"""A step that hangs ends the run: a collective that waits for a lost rank would burn the night otherwise."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch

from launcher.exit_codes import HUNG

FIRST_STEP = 3  # times the limit: it compiles, and fills caches
GRACE = 10.0  # seconds for the other ranks' stacks: a rank that leaves ends those that wait for it


class Watchdog:
    """Ends this process with `HUNG` where what it does takes too long, after writing its Python stacks.

    They go to `stacks/rank-N.txt` in the run folder and to stderr. It is a thread, which runs while the main thread
    waits in C; where C holds on to the interpreter's lock, faulthandler's own thread writes the stacks and ends the
    process (with code 1). `report` is called first, with a sentence. `longest`: the time after which the process has
    ended for certain, whatever it was at; who waits for another rank should bear that long, so that this speaks first.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, report: Callable[[str], None]) -> None:
        self.seconds = seconds
        self.longest = timedelta(seconds=FIRST_STEP * seconds + 4 * GRACE)
        self._report = report
        self._rank = rank
        self._what = ""
        self._path = folder / "stacks" / f"rank-{rank}.txt"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "w")  # noqa: SIM115 - a hung process is not the one to open a file
        self._deadline = float("inf")
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begins(self, what: str, first: bool = False) -> None:
        """From now on the process is at `what`, for at most the limit; the first of its kind has longer."""
        seconds = self.seconds * (FIRST_STEP if first else 1)
        self._what, self._deadline = what, time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds + 3 * GRACE, exit=True, file=self._file)

    @contextmanager
    def at_each_forward(self, module: torch.nn.Module, what: str, first: bool = False) -> Iterator[None]:
        """Within it each forward of `module` has the limit for itself: together they may take as long as they like."""
        self.begins(what, first)
        hook = module.register_forward_pre_hook(lambda *_: self.begins(what, first))
        try:
            yield
        finally:
            hook.remove()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
        with suppress(OSError):  # another rank's file is there still
            self._path.parent.rmdir()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() > self._deadline:
                return self._end()

    def _end(self) -> None:
        # Before anything is written: the file system may be what hangs.
        threading.Timer(GRACE, os._exit, [HUNG]).start()
        faulthandler.dump_traceback(self._file)
        sentence = (
            f"{self._what} hangs: it took longer than step_timeout_seconds allows; the stacks are in {self._path}"
        )
        print(f"error: rank {self._rank}: {sentence}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__)
        self._report(sentence)

"""End a run whose step hangs; a collective that waits for a lost rank would otherwise block it until someone notices."""

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

FIRST_STEP = 3  # the first step may take this many times the normal limit: it compiles kernels and fills caches
# Seconds to wait so that the other ranks can write their stacks: a rank that exits ends those that wait for it.
GRACE = 10.0


class Watchdog:
    """Write this process's Python stacks and end it with `HUNG` if its current activity takes too long.

    The stacks go to `stacks/rank-N.txt` in the run folder and to stderr; then `report` is called with a sentence. A
    thread does this, because the main thread may wait in C code. If that code holds the interpreter's lock,
    faulthandler's own thread writes the stacks and ends the process with code 1.
    `longest`: the time after which the process has certainly ended. Timeouts of waits for other ranks should be at
    least that long, so that the watchdog reports first.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, report: Callable[[str], None]) -> None:
        self.seconds = seconds
        self.longest = timedelta(seconds=FIRST_STEP * seconds + 4 * GRACE)
        self._report = report
        self._rank = rank
        self._what = ""
        self._path = folder / "stacks" / f"rank-{rank}.txt"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "w")  # noqa: SIM115 - opened now, because a hung process may not be able to
        self._deadline = float("inf")
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begins(self, what: str, first: bool = False) -> None:
        """Start the time limit for the activity `what`; the first of its kind gets `FIRST_STEP` times as long."""
        seconds = self.seconds * (FIRST_STEP if first else 1)
        self._what, self._deadline = what, time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds + 3 * GRACE, exit=True, file=self._file)

    @contextmanager
    def at_each_forward(self, module: torch.nn.Module, what: str, first: bool = False) -> Iterator[None]:
        """Restart the time limit at each forward of `module` within this context; their total time is unlimited."""
        self.begins(what, first)
        hook = module.register_forward_pre_hook(lambda *_: self.begins(what, first))
        try:
            yield
        finally:
            hook.remove()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
        with suppress(OSError):  # another rank's file is still there
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
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        self._report(sentence)

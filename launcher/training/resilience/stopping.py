"""Stopping at a signal: all ranks agree at a step boundary, so that the checkpoint is one of all of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist

from launcher.exit_codes import INTERRUPTED

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # HUP: a terminal was closed
LOOK_AT_LAUNCHERS = 1.0  # seconds between two looks at whether they still run
SAME_REQUEST = 2.0  # seconds in which the signals of one Ctrl-C come: the terminal's, and those of launchers


class StopRequest:
    """SIGTERM, SIGUSR1, SIGINT or SIGHUP at any rank ask all of them to stop at the next step boundary, with a checkpoint.

    So does the end of the deepspeed launcher that started them, which passes no signal on that only it gets.
    A second SIGINT more than `SAME_REQUEST` seconds after the first ends this process at once: Ctrl-C twice. SIGTERM
    always asks: the deepspeed launcher sends it to one rank after another for as long as each takes to save.
    `agreed`: whether the ranks have agreed to stop. `report` is called with a sentence before an end at once.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self.agreed = False
        self._received = False
        self._interrupted: float | None = None
        # Python runs a handler between two instructions of the main thread, which a hung collective never reaches.
        # This pipe is written to by the signal itself, and a thread reads it.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._receive, args=(reading,), name="signals", daemon=True).start()
        for number in REQUESTS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asked for that
            signal.signal(number, lambda number, frame: None)
        if (launchers := _deepspeed_launchers()) is not None:
            threading.Thread(target=self._watch, args=(launchers,), name="launchers", daemon=True).start()

    def requested(self, device: torch.device) -> torch.Tensor:
        """1 where this rank was asked to stop, to be added up over the ranks."""
        return torch.tensor(float(self._received), device=device)

    def agree(self, device: torch.device) -> bool:
        """Ask all ranks within something long between two steps; called by all of them."""
        asked = self.requested(device)
        dist.all_reduce(asked)
        self.agreed = bool(asked.item())
        return self.agreed

    def _receive(self, reading: int) -> None:
        while True:
            (number,) = os.read(reading, 1)
            now = time.monotonic()
            if number == signal.SIGINT and self._interrupted is None:
                self._interrupted = now
            elif number == signal.SIGINT and now - self._interrupted > SAME_REQUEST:
                print("interrupted twice: stopping at once, without a checkpoint", file=sys.stderr, flush=True)
                self._report("interrupted twice")
                os._exit(INTERRUPTED)
            self._received = self._received or number in REQUESTS

    def _watch(self, launchers: tuple[int, int]) -> None:
        while _deepspeed_launchers() == launchers and not _was_orphaned(launchers):
            time.sleep(LOOK_AT_LAUNCHERS)
        print("the deepspeed launcher has ended: stopping with a checkpoint", file=sys.stderr, flush=True)
        self._received = True


def _deepspeed_launchers() -> tuple[int, int] | None:
    """The process of DeepSpeed that started this one, and the `deepspeed` command that started that; None under others."""
    try:
        parent = psutil.Process(os.getppid())
        is_deepspeed = "deepspeed.launcher.launch" in parent.cmdline()
        return (parent.pid, parent.ppid()) if is_deepspeed else None
    except psutil.NoSuchProcess:
        return None


def _was_orphaned(launchers: tuple[int, int]) -> bool:
    """Whether the `deepspeed` command had ended before it was first looked at; in a container it may be process 1 itself."""
    if launchers[1] != 1:
        return False
    try:
        return not any("deepspeed" in word for word in psutil.Process(1).cmdline())
    except psutil.Error:  # another user's process, of which this one may see nothing
        return True

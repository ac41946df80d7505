"""Stop at a signal: all ranks agree on the step boundary, so that they save the same checkpoint."""

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

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed
LOOK_AT_LAUNCHERS = 1.0  # seconds between checks that the launchers still run
# One Ctrl-C sends several signals, from the terminal and from launchers; all arrive within so many seconds.
SAME_REQUEST = 2.0


class StopRequest:
    """Stop all ranks at the next step boundary, with a checkpoint, once any rank gets a signal in `REQUESTS`.

    - The end of the deepspeed launcher counts as a request: it does not pass on a signal that only it receives.
    - A second SIGINT more than `SAME_REQUEST` seconds after the first (Ctrl-C twice) ends this process at once, after a
      call of `report` with a sentence.
    - A repeated SIGTERM is only a request: the deepspeed launcher sends it to one rank after another, and waits while
      each saves.

    `agreed`: whether the ranks have agreed to stop.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self.agreed = False
        self._received = False
        self._interrupted: float | None = None
        # Python runs signal handlers between bytecode instructions of the main thread, so never during a hung
        # collective. The signal itself writes to this pipe instead, and a thread reads it.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._receive, args=(reading,), name="signals", daemon=True).start()
        for number in REQUESTS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # set by nohup
            signal.signal(number, lambda number, frame: None)
        if (launchers := _deepspeed_launchers()) is not None:
            threading.Thread(target=self._watch, args=(launchers,), name="launchers", daemon=True).start()

    def requested(self, device: torch.device) -> torch.Tensor:
        """Return 1 if this rank was asked to stop, else 0; sum it over the ranks."""
        return torch.tensor(float(self._received), device=device)

    def agree(self, device: torch.device) -> bool:
        """Agree on stopping within long work between two steps, such as a validation; all ranks must call it."""
        asked = self.requested(device)
        dist.all_reduce(asked)
        self.agreed = bool(asked.item())
        return self.agreed

    def _receive(self, reading: int) -> None:
        while True:
            (number,) = os.read(reading, 1)
            now = time.monotonic()
            first = self._interrupted
            if number == signal.SIGINT and first is None:
                self._interrupted = now
            elif number == signal.SIGINT and first is not None and now - first > SAME_REQUEST:
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
    """Return the ids of DeepSpeed's launcher process and of its parent, the `deepspeed` command; None without them."""
    try:
        parent = psutil.Process(os.getppid())
        is_deepspeed = "deepspeed.launcher.launch" in parent.cmdline()
        return (parent.pid, parent.ppid()) if is_deepspeed else None
    except psutil.NoSuchProcess:
        return None


def _was_orphaned(launchers: tuple[int, int]) -> bool:
    """Return whether the `deepspeed` command had already ended before the first check.

    A parent with number 1 is no proof: in a container, `deepspeed` may be process 1 itself.
    """
    if launchers[1] != 1:
        return False
    try:
        return not any("deepspeed" in word for word in psutil.Process(1).cmdline())
    except psutil.Error:  # another user's process, which this one may not inspect
        return True

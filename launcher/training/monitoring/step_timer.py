"""Timing of the parts of a step, correct on GPUs, which run asynchronously to Python."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Add up the time spent in each named part, with events on CUDA and with a clock elsewhere."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        if self._is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call; on CUDA this waits until the last part is done."""
        for part, begin, end in self._events:
            end.synchronize()
            self._seconds[part] += begin.elapsed_time(end) / 1000
        taken = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return taken

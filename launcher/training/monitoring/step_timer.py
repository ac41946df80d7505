"""Seconds that the parts of a step take, also where a GPU works on after Python has moved on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Adds up the time in each named part until it is taken: with events on CUDA, with a clock elsewhere."""

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
            begin = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Give the seconds of each part since they were last taken; on CUDA this waits for the last of them."""
        for part, begin, end in self._events:
            end.synchronize()
            self._seconds[part] += begin.elapsed_time(end) / 1000
        taken = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return taken

"""A torch profiler trace of a few steps of rank 0, with a memory snapshot on CUDA."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENTS = 100_000  # allocations and releases in a memory snapshot


class StepProfiler:
    """Write `trace-A-B.json` (for chrome://tracing or Perfetto) and, on CUDA, `memory-A-B.pickle` into a folder.

    steps: the first and the last step to profile.
    """

    def __init__(self, folder: Path, steps: list[int]):
        self.folder = folder
        self.first, self.last = steps
        self._profile: profile | None = None

    def step_begins(self, step: int) -> None:
        if step == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def step_ended(self, step: int) -> Path | None:
        """Write the files after the last profiled step and return the path of the trace; None after other steps."""
        if self._profile is None or step < self.last:
            return None
        name = f"{self.first}-{self.last}"
        self.folder.mkdir(exist_ok=True)
        self._profile.stop()
        trace = self.folder / f"trace-{name}.json"
        self._profile.export_chrome_trace(str(trace))
        self._profile = None
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return trace

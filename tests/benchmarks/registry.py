"""All benchmarks in the order of the table, and the environment that each of them runs in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

# Waiting processes with several threads spin, which disturbs other measurements.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Training keeps the memory that it frees (launcher/process.py). These variables do the same from a process's start.
AS_IN_TRAINING = {**ONE_THREAD, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


@dataclass(frozen=True)
class Benchmark:
    """A function `(Options) -> list[Row]`, by name: listing benchmarks must not wait for torch."""

    module: str
    function: str = "measure"
    environment: dict[str, str] = field(default_factory=lambda: ONE_THREAD)

    def variables(self) -> dict[str, str]:
        """Return the environment of the benchmark's process."""
        return {**os.environ, **self.environment}


BENCHMARKS = {
    "prepare": Benchmark("tests.benchmarks.prepare"),
    "read": Benchmark("tests.benchmarks.read"),
    "load": Benchmark("tests.benchmarks.load"),
    "start-up": Benchmark("tests.benchmarks.startup"),
    "model-step": Benchmark("tests.benchmarks.model_step", environment=AS_IN_TRAINING),
    "linear": Benchmark("tests.benchmarks.linear", "measure_growth", AS_IN_TRAINING),
    "loss-memory": Benchmark("tests.benchmarks.linear", "measure_loss_memory", AS_IN_TRAINING),
    "deepspeed": Benchmark("tests.benchmarks.training_step", "measure_overhead", AS_IN_TRAINING),
    "ranks": Benchmark("tests.benchmarks.training_step", "measure_weak_scaling", AS_IN_TRAINING),
    "checkpoint": Benchmark("tests.benchmarks.checkpointing", environment=AS_IN_TRAINING),
    "decoding": Benchmark("tests.benchmarks.generate", environment=AS_IN_TRAINING),
    "optimizer": Benchmark("tests.benchmarks.optimizer", environment=AS_IN_TRAINING),
}

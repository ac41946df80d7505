"""Start real training processes for tests as ranks on this machine, and read the files that they write."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.environment import free_port
from tests import fork_server
from tests.small_model import SIZES

PROJECT = Path(__file__).parents[2]
RUN = {
    "max_steps": 5,
    "checkpoint_every": 1000,
    "global_batch_rows": 4,
    "micro_batch_rows": 4,
    "learning_rate": 0.003,
    "warmup_steps": 2,
    "loss_on": "answer",
    "balancing_rate": 0.02,  # large enough that a few steps send tokens to other experts
}


class Trainer:
    """Start training processes and read the files that they have written."""

    def __init__(self, folder: Path, data: Path):
        self.folder = folder
        self.data = data
        self.model = folder / "model.yaml"
        self.model.write_text(yaml.safe_dump(SIZES))
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump({**RUN, "data": str(data), "model": str(self.model)}))
        self.fp32 = self.deepspeed_config("fp32")

    def deepspeed_config(self, name: str, **changes) -> Path:
        """Write `ds_configs/zero3.json` without fp16, and with the sections in `changes`."""
        content = json.loads((PROJECT / "ds_configs" / "zero3.json").read_text())
        del content["fp16"]
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({**content, **changes}))
        return path

    def arguments(self, output: str, *overrides: str, deepspeed_config: Path | None = None) -> list[str]:
        return [
            "--deepspeed_config",
            str(deepspeed_config or self.fp32),
            "--config",
            str(self.config),
            f"output={self.folder / output}",
            *overrides,
        ]

    def run(self, world_size: int, *runs: list[str], **options) -> list[subprocess.CompletedProcess]:
        """Train `runs` one after another in one set of processes; fail if a process fails."""
        command = [sys.executable, "-m", "launcher_worker", json.dumps([*runs]), json.dumps(options)]
        results = start(world_size, command, patience=10)
        # Show the output of all ranks: the first one that failed may not be the cause.
        told = "\n".join(f"rank {rank} ended with {r.returncode}:\n{r.stdout}" for rank, r in enumerate(results))
        assert [result.returncode for result in results] == [0] * world_size, told
        return results

    def run_with_faults(
        self, world_size: int, arguments: list[str], faults: list[dict], **options
    ) -> list[subprocess.CompletedProcess]:
        """Train one run in which `faults` (tests/launcher/fault_worker.py) happen; processes may fail."""
        options = {"faults": faults, **options}
        return start(
            world_size, [sys.executable, "-m", "fault_worker", json.dumps(arguments), json.dumps(options)], patience=60
        )

    def run_with_save_faults(
        self, runs: list[list[str]], faults: list[tuple[int, int, int, str]]
    ) -> list[subprocess.CompletedProcess]:
        """Train on two ranks with faults (run, step, rank, kind) as in checkpoint_worker.py; processes may fail."""
        named = [dict(zip(("run", "step", "rank", "kind"), fault, strict=True)) for fault in faults]
        return start(2, [sys.executable, "-m", "checkpoint_worker", json.dumps(runs), json.dumps(named)])

    def scalars(self, output: str) -> dict[str, dict[int, float]]:
        """Return a run's TensorBoard curves: the value at each step, by tag; fail if a step has two points."""
        reader = EventAccumulator(str(self.folder / output / "tensorboard"), size_guidance={"scalars": 0})
        reader.Reload()
        shown = {}
        for tag in reader.Tags()["scalars"]:
            events = reader.Scalars(tag)
            shown[tag] = {event.step: event.value for event in events}
            assert len(shown[tag]) == len(events), f"{tag} has two points at one step"
        return shown


def start(
    world_size: int, command: list[str], timeout: int = 240, patience: float = 0
) -> list[subprocess.CompletedProcess]:
    """Run a command as `world_size` ranks on this machine; `patience` seconds after one fails, the others are killed."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(Path(__file__).parent)]),
        "PYTHONFAULTHANDLER": "1",  # a crash in native code says where
    }
    outputs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115 - closed with the test
    processes = [
        fork_server.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=PROJECT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + patience)
            patience = timeout
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    results = []
    for process, output in zip(processes, outputs, strict=True):
        output.seek(0)
        results.append(subprocess.CompletedProcess(command, process.returncode, output.read()))
    return results

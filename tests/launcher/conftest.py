"""Real training runs for tests: processes on gloo, small data, a small model."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from launcher.environment import free_port

PROJECT = Path(__file__).parents[2]
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "deformable_taps": 3,
    "deformable_range": 6,
    "deformable_groups": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "memory_hidden_size": 12,
    "memory_num_layers": 2,
    "memory_stride": 4,
    "memory_every": 2,
    "embedding_components": 16,
    "embedding_temperature": 1.0,
}
RUN = {
    "max_steps": 5,
    "checkpoint_every": 1000,
    "global_batch_rows": 4,
    "micro_batch_rows": 4,
    "learning_rate": 0.003,
    "warmup_steps": 2,
    "loss_on": "answer",
    "balancing_rate": 0.02,  # so large that a few steps send tokens to other experts
}


class Trainer:
    """Starts training processes and reads what they left behind."""

    def __init__(self, folder: Path, data: Path):
        self.folder = folder
        self.data = data
        self.model = folder / "model.yaml"
        self.model.write_text(yaml.safe_dump(MODEL))
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump({**RUN, "data": str(data), "model": str(self.model)}))
        self.fp32 = self.deepspeed_config("fp32")

    def deepspeed_config(self, name: str, **changes) -> Path:
        """`ds_configs/zero3.json` without fp16 and with other sections where named."""
        content = json.loads((PROJECT / "ds_configs" / "zero3.json").read_text())
        del content["fp16"]
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({**content, **changes}))
        return path

    def arguments(self, output: str, *overrides: str, deepspeed_config: Path | None = None) -> list[str]:
        return [
            "--deepspeed_config", str(deepspeed_config or self.fp32), "--config", str(self.config),
            f"output={self.folder / output}", *overrides,
        ]  # fmt: skip

    def run(self, world_size: int, *runs: list[str], **options) -> list[subprocess.CompletedProcess]:
        """Train `runs` one after another in one set of processes; fails the test where a process fails."""
        results = start(world_size, [sys.executable, "-m", "launcher_worker", json.dumps([*runs]), json.dumps(options)])
        for result in results:
            assert result.returncode == 0, result.stdout
        return results

    def run_with_faults(
        self, world_size: int, arguments: list[str], faults: list[dict], **options
    ) -> list[subprocess.CompletedProcess]:
        """Train one run in which `faults` (tests/launcher/fault_worker.py) happen; processes may fail."""
        options = {"faults": faults, **options}
        return start(
            world_size, [sys.executable, "-m", "fault_worker", json.dumps(arguments), json.dumps(options)], patience=20
        )

    def run_with_save_faults(
        self, runs: list[list[str]], faults: list[tuple[int, int, int, str]]
    ) -> list[subprocess.CompletedProcess]:
        """Train on two ranks with faults (run, step, rank, kind) as in checkpoint_worker.py; processes may fail."""
        named = [dict(zip(("run", "step", "rank", "kind"), fault, strict=True)) for fault in faults]
        return start(2, [sys.executable, "-m", "checkpoint_worker", json.dumps(runs), json.dumps(named)])

    def scalars(self, output: str) -> dict[str, dict[int, float]]:
        """What TensorBoard shows of a run: the value of each step, by tag; fails where a step has two points."""
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
    """Run a command as `world_size` ranks on this machine; `patience` seconds after one fails, the others are ended."""
    environment = {
        **os.environ, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join([str(PROJECT), str(Path(__file__).parent)]),
    }  # fmt: skip
    outputs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115 - closed with the test
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=PROJECT,
            stdout=output, stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
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


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    prepare("sample", folder, Settings(seq_len=64), progress=False)
    return folder


@pytest.fixture(scope="session")
def exported(sample_data, tmp_path_factory) -> Path:
    """A model folder with the sample's tokenizer and weights at random, far enough from zero that all of them matter."""
    import shutil

    import torch

    from data_pipeline.loading.reader import ShardFolder
    from model import LiquidConfig, LiquidForCausalLM

    torch.manual_seed(0)
    model = LiquidForCausalLM(LiquidConfig(**MODEL).sized_for(ShardFolder(sample_data).vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("exported") / "small"
    shutil.copytree(sample_data / "tokenizer", folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, sample_data) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("runs"), sample_data)

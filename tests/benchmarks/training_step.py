"""What a training step costs under DeepSpeed: beside a bare PyTorch loop, and on two ranks beside one.

    python -m tests.benchmarks deepspeed ranks

Each loop lives in processes of its own, one thread each, which wait until they are told to take a step. So two loops can
take turns, and the one that waits takes no processor time. All train in fp32 with torch's fused AdamW and clip gradients.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.environment import free_port
from tests.benchmarks.measurement import Goal, Options, Row, rates, seconds_of, take_turns

PROJECT = Path(__file__).parents[2]
DEEPSPEED_JSON = PROJECT / "ds_configs" / "zero3.json"
STEP, SECONDS = "step", "seconds: "  # what a loop is told, and how its answer begins: DeepSpeed prints lines, too
WARM_UP, REPEATS = 2, 9


@dataclass(frozen=True)
class Loop:
    """What a loop trains, and how: `deepspeed` with ds_configs/zero3.json, or `plain` PyTorch.

    `layers` is fewer than the preset's to save time. `rows` are those of one rank.
    """

    kind: str
    preset: str
    layers: int
    vocabulary: int
    rows: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens of one rank's step."""
        return self.rows * self.seq_len


def measure_overhead(options: Options) -> list[Row]:
    """Seconds of a step of `base`'s width, beside the same step in a bare loop."""
    loop = Loop("deepspeed", "base", layers=2, vocabulary=8192, rows=1 if options.quick else 4, seq_len=512)
    seconds = measure_loops({"ours": (loop, 1), "plain": (dataclasses.replace(loop, kind="plain"), 1)}, options)
    what = f"step under ZeRO-3 and AutoEP: `base`'s width, {loop.layers} layers, {loop.tokens:,} tokens"
    return [Row(what, "s", seconds["ours"], "bare PyTorch loop", seconds["plain"], Goal(at_most=1.1))]


def measure_weak_scaling(options: Options) -> list[Row]:
    """Tokens per second and core on two ranks, beside one rank with as many tokens a rank."""
    loop = Loop("deepspeed", "tiny", layers=4, vocabulary=2048, rows=2 if options.quick else 8, seq_len=256)
    what, peer = f"`tiny` on 2 ranks, {loop.tokens:,} tokens and one core each", "1 rank"
    if len(os.sched_getaffinity(0)) < 2:
        return [Row(what, "tokens/s per core", [], peer, not_run="needs two cores")]
    seconds = measure_loops({"two": (loop, 2), "one": (loop, 1)}, options)
    speeds = {name: rates(loop.tokens, values) for name, values in seconds.items()}
    return [Row(what, "tokens/s per core", speeds["two"], peer, speeds["one"], Goal(at_least=0.8))]


def measure_loops(loops: dict[str, tuple[Loop, int]], options: Options) -> dict[str, list[float]]:
    """Start loops, each on so many ranks, and have them take steps by turns; returns the steps' seconds."""
    running = {}
    try:
        for name, (loop, ranks) in loops.items():
            running[name] = RunningLoop(loop, ranks)
        steps = {name: each.step for name, each in running.items()}
        take_turns(steps, WARM_UP)
        return take_turns(steps, options.repeats(REPEATS))
    finally:
        for each in running.values():
            each.end()


class RunningLoop:
    """The processes of a loop, one for each rank."""

    def __init__(self, loop: Loop, ranks: int):
        command = [sys.executable, "-m", "tests.benchmarks.training_step", json.dumps(dataclasses.asdict(loop))]
        place = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self._processes = [
            subprocess.Popen(
                command,
                cwd=PROJECT,
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def step(self) -> float:
        """Have all ranks take a step; returns the seconds of the slowest. Raises `RuntimeError` if one has ended."""
        for process in self._processes:
            process.stdin.write(f"{STEP}\n")
            process.stdin.flush()
        return max(self._answer(process) for process in self._processes)

    @staticmethod
    def _answer(process: subprocess.Popen) -> float:
        for line in process.stdout:
            if line.startswith(SECONDS):
                return float(line.removeprefix(SECONDS))
        raise RuntimeError(f"a rank has ended with {process.wait()}")

    def end(self) -> None:
        """End all ranks at once: none of them has anything to finish."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def main() -> None:
    """Be one rank of a loop: take a step for each line on stdin."""
    loop = Loop(**json.loads(sys.argv[1]))
    step = (deepspeed_step if loop.kind == "deepspeed" else plain_step)(loop)
    for _ in sys.stdin:
        print(f"{SECONDS}{seconds_of(step)}", flush=True)


def deepspeed_step(loop: Loop) -> Callable[[], None]:
    """Return a function that takes a step as train.py does, without its monitoring."""
    from model.loss import LossWeights, RunningMeans, total_loss

    engine, batch, counts = build_training(loop)
    config = engine.module.config
    means = RunningMeans.initial(config.num_hidden_layers, config.num_experts, config.embedding_target_ratio)
    weights = LossWeights()

    def step() -> None:
        output = engine(**batch, running_means=means)
        engine.backward(total_loss(output.loss_sums, weights, *counts))
        engine.step()

    return step


def plain_step(loop: Loop) -> Callable[[], None]:
    """Return a function that takes the same step in plain PyTorch."""
    import torch

    from launcher.environment import detect_environment
    from launcher.process import export_for_torch
    from model.loss import LossWeights, RunningMeans, total_loss

    export_for_torch(detect_environment())
    model, batch, counts = build_model(loop)
    config, weights = model.config, LossWeights()
    means = RunningMeans.initial(config.num_hidden_layers, config.num_experts, config.embedding_target_ratio)
    # As the JSON's optimizer and the run's defaults say.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        output = model(**batch, running_means=means)
        total_loss(output.loss_sums, weights, *counts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_model(loop: Loop) -> tuple:
    """Build a model in training, a batch, and the batch's supervised and text tokens."""
    import torch

    from model import LiquidConfig, LiquidForCausalLM
    from model.metrics import count_tokens
    from tests.benchmarks.packed_rows import PAD, make_batch

    torch.manual_seed(0)
    config = LiquidConfig.from_preset(loop.preset)
    # The last of few layers has a memory, as it has in the whole preset.
    sizes = {"num_hidden_layers": loop.layers, "memory_every": min(config.memory_every, loop.layers)}
    model = LiquidForCausalLM(config.sized_for(loop.vocabulary, **sizes)).train()
    batch = make_batch(loop.rows, loop.seq_len, loop.vocabulary)
    counts = count_tokens(batch, PAD)
    return model, batch, (counts["supervised"], counts["tokens"])


def build_training(loop: Loop) -> tuple:
    """Join the other ranks and hand the model to DeepSpeed; returns the engine, a batch and its counts."""
    from launcher.config import RunConfig
    from launcher.environment import detect_environment
    from launcher.process import export_for_torch
    from launcher.training.engine import build_engine, start_process_group
    from launcher.training.setup.deepspeed_config import resolve_deepspeed_config

    environment = detect_environment()
    export_for_torch(environment)
    start_process_group(environment)
    model, batch, counts = build_model(loop)
    ranks = environment.world_size
    config = RunConfig(
        global_batch_rows=ranks * loop.rows,
        micro_batch_rows=loop.rows,
        expert_parallel_size=ranks,
        activation_checkpointing=False,
    )
    resolved, *_ = resolve_deepspeed_config(DEEPSPEED_JSON, config, environment, model.config.num_experts)
    for half in ("fp16", "bf16"):  # fp32 on both sides: in half precision DeepSpeed keeps fp32 copies as well
        resolved.pop(half, None)
    return build_engine(model, resolved), batch, counts


if __name__ == "__main__":
    main()

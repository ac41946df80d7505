"""A summary of the run, printed before its first step."""

from __future__ import annotations

import torch

from data_pipeline.loading.row_reader import RowReader
from launcher.config import RunConfig
from launcher.deepspeed_json import expert_parallel_size, precision, zero_stage
from launcher.environment import Environment
from model import LiquidConfig, LiquidForCausalLM
from model.size import count_parameters


def start_summary(
    config: RunConfig, deepspeed: dict, sizes: LiquidConfig, data: RowReader, environment: Environment
) -> list[str]:
    """Return the lines that rank 0 prints before the first step. `deepspeed` is the resolved JSON."""
    with torch.device("meta"):  # the engine's own parameters may be partitioned over the ranks
        count = count_parameters(LiquidForCausalLM(sizes))
    micro = deepspeed["train_micro_batch_size_per_gpu"]
    steps = deepspeed["gradient_accumulation_steps"]
    rows = config.global_batch_rows
    schedule = config.schedule
    cycles = f" in {schedule.cycles} cycles" if schedule.cycles > 1 else ""
    cosine = f"a cosine{cycles} down to {config.learning_rate * schedule.minimum_ratio:g}"
    recomputed = "recomputed" if config.activation_checkpointing else "kept"
    facts = {
        "model": f"{count.total:,} parameters, {count.active:,} of them active for a token; "
        f"{sizes.num_hidden_layers} layers, width {sizes.hidden_size}",
        "data": f"{data.location}: {data.num_rows:,} rows of {data.seq_len:,} tokens, loss on {config.loss_on} tokens",
        "batch": f"{rows:,} rows ({rows * data.seq_len:,} tokens) a step: ranks {environment.world_size} x "
        f"micro-batches {steps} x rows {micro}",
        "schedule": f"{config.max_steps:,} steps; learning rate up to {config.learning_rate:g} in {config.warmup_steps:,} "
        f"steps, then {cosine}",
        "engine": f"{precision(deepspeed)}, ZeRO stage {zero_stage(deepspeed)}, expert parallelism "
        f"{expert_parallel_size(deepspeed)}, activations {recomputed}, attention {sizes._attn_implementation}",
        "devices": f"{environment.world_size} x {_device_name(environment)}",
        "run folder": config.output,
    }
    return [f"{name + ':':12}{fact}" for name, fact in facts.items()]


def _device_name(environment: Environment) -> str:
    if environment.device.type == "cuda":
        memory = torch.cuda.get_device_properties(environment.device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(environment.device)} ({memory:.0f} GiB)"
    return f"CPU, {torch.get_num_threads()} threads each"

"""What a run is going to do, decided by rank 0 before the others join.

Whatever a user can have got wrong is found here, once, before a process group exists: one rank prints one sentence, and
nobody waits in a collective for a rank that has given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from data_pipeline.prepare import prepare
from data_pipeline.shards import ShardFolder
from launcher.checkpoint import check_manifest, find_checkpoint
from launcher.config import RunConfig, load_run_config
from launcher.deepspeed_config import resolve_deepspeed_config
from launcher.environment import Environment
from launcher.model_source import model_config
from launcher.run_folder import RunFolder


@dataclass(frozen=True)
class Plan:
    """The configuration that the JSON agrees with, the resolved JSON, what to resume from, what to tell the user."""

    config: RunConfig
    deepspeed: dict
    checkpoint: Path | None
    notes: list[str]


def make_plan(
    config_path: str, overrides: list[str], deepspeed_path: str, environment: Environment
) -> tuple[Plan, RunFolder]:
    """Check everything that can be known now, prepare missing data, claim the run folder and choose the checkpoint.

    Raises `ConfigurationError` or `DataError`.
    """
    config = load_run_config(config_path, overrides)
    _prepare_if_missing(config)
    data = ShardFolder(config.data)
    sizes = model_config(config, data)
    resolved, config, notes = resolve_deepspeed_config(deepspeed_path, config, environment, sizes.num_experts)
    run = RunFolder(config.output)
    run.claim()
    checkpoint, passed_over = find_checkpoint(run, config.resume)
    if checkpoint is not None:
        check_manifest(checkpoint, environment, data.fingerprint)
        notes = [*notes, *passed_over, f"resuming from {checkpoint}"]
    run.describe(config, resolved, environment)
    run.keep_model_files(sizes, data.tokenizer_path)
    return Plan(config, resolved, checkpoint, notes), run


def share_plan(plan: Plan | None) -> Plan:
    """Give every rank the plan of rank 0."""
    shared = [plan]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _prepare_if_missing(config: RunConfig) -> None:
    """Make the data folder where the configuration says how and it is not there yet."""
    if config.prepare is not None and not (Path(config.data) / "index.json").exists():
        print(f"preparing {config.prepare.source} into {config.data}", flush=True)
        prepare(config.prepare.source, config.data, tokenizer=config.prepare.tokenizer, seq_len=config.prepare.seq_len)

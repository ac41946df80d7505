"""The plan of a run, made by rank 0 before the other ranks join.

Mistakes of the user are found here, before a process group exists. So a single rank prints a single sentence, and no rank
waits in a collective for one that has failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from launcher.config import Prepare, RunConfig
from launcher.config_file import load_run_config
from launcher.deepspeed_json import expert_parallel_size, precision, zero_stage
from launcher.environment import Environment
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import find_checkpoint, has_checkpoints, read_train_state
from launcher.training.checkpoints.going_back import go_back, still_to_do
from launcher.training.checkpoints.manifest import read_manifest
from launcher.training.checkpoints.states import check_states
from launcher.training.checkpoints.universal import for_ranks
from launcher.training.monitoring.validation import open_validation_data
from launcher.training.preflight.checks import check_start
from launcher.training.setup.data_source import open_run_data, to_prepare
from launcher.training.setup.deepspeed_config import SHARED_NUMBERS, resolve_deepspeed_config
from launcher.training.setup.model_source import model_config
from model.configuration import LiquidConfig, own_fields

# Numbers of the resolved JSON that follow from the run's keys, whose changes are reported themselves, or from the number of
# ranks.
FOLLOWS_FROM_OTHERS = {*SHARED_NUMBERS, "gradient_accumulation_steps"}


@dataclass(frozen=True)
class Plan:
    """What rank 0 decided for this start.

    config, deepspeed: the run configuration and the resolved JSON, which agree.
    checkpoint, step: what to resume from; None and 0 for a new run.
    notes: lines to print.
    """

    config: RunConfig
    deepspeed: dict
    checkpoint: Path | None
    step: int
    notes: list[str]


def make_plan(
    config_path: str, overrides: list[str], deepspeed_path: str, environment: Environment
) -> tuple[Plan, RunFolder]:
    """Check everything that can be known now, prepare missing data, claim the run folder and choose the checkpoint.

    Raises `ConfigurationError` or `DataError`.
    """
    config = load_run_config(config_path, overrides)
    run = RunFolder(config.output)
    try:
        return _plan(config, run, deepspeed_path, environment), run
    except BaseException as error:
        run.refuse(error)
        raise


def _plan(config: RunConfig, run: RunFolder, deepspeed_path: str, environment: Environment) -> Plan:
    if missing := to_prepare(config):
        _prepare(*missing)
    data = open_run_data(config)
    open_validation_data(config, data)
    sizes = model_config(config, data, run if has_checkpoints(run) else None)
    resolved, config, notes = resolve_deepspeed_config(deepspeed_path, config, environment, sizes.num_experts)
    notes += check_start(config, resolved, sizes, environment)
    run.claim()
    resume, obeyed = still_to_do(run, config.resume)
    checkpoint, passed_over = find_checkpoint(run, resume)
    schedule_end, step = config.schedule.steps or config.max_steps, 0
    if checkpoint is not None:
        _check_resumable(checkpoint, run, config, sizes, data.fingerprint)
        _check_engine(run, resolved)
        began_with = run.began_with()
        if config.init_from not in (None, began_with):
            notes.append(f"init_from={config.init_from} is not read: {run.path} resumes from its own checkpoint")
        config.init_from = began_with
        schedule_end = config.schedule.steps or run.read_description()["config"]["schedule"]["steps"]
        checkpoint, renamed = go_back(run, checkpoint, config.resume)
        step = read_train_state(checkpoint).step
        notes += [*obeyed, *passed_over, f"resuming from {checkpoint}", *renamed]
        if step >= config.max_steps:
            notes.append(f"{run.path} is already at step {step}; set a larger max_steps to continue")
        if config.max_steps > schedule_end:
            notes.append(f"the learning rate schedule ends at step {schedule_end}; later steps use its minimum")
    if config.warmup_steps > schedule_end:
        notes.append(
            f"the learning rate schedule ends at step {schedule_end}, within the warm-up of {config.warmup_steps} steps, so "
            "the rate never reaches learning_rate; lower warmup_steps"
        )
    # Recorded in run.yaml, so that raising max_steps later does not stretch the schedule.
    config.schedule.steps = schedule_end
    changed = run.describe(config, resolved, environment, checkpoint.name if checkpoint else None)
    if checkpoint is not None:
        notes += _changes(changed)
    run.keep_model_files(sizes, data.tokenizer_path)
    # After `describe`, which records the checkpoint itself: only this start needs it in another form.
    if checkpoint is not None:
        checkpoint, converted = for_ranks(checkpoint, environment.world_size, expert_parallel_size(resolved))
        check_states(checkpoint)
        notes += [converted] if converted else []
    return Plan(config, resolved, checkpoint, step, notes)


def _changes(changed: dict[str, list]) -> list[str]:
    """Return a note on settings and versions that changed since the previous start; an empty list if none did."""
    told = []
    for name, (before, now) in changed.items():
        section, _, key = name.partition(".")
        if section == "deepspeed" and key in FOLLOWS_FROM_OTHERS:
            continue
        shown = {"config": key, "deepspeed": f"{key} in the DeepSpeed JSON", "versions": f"{key}'s version"}
        if name != "config.resume":
            told.append(f"{shown.get(section, name)} {before} -> {now}")
    return [f"changed since the previous start: {', '.join(told)}"] if told else []


def share_plan(plan: Plan | None) -> Plan:
    """Send rank 0's plan to all ranks, and return it."""
    shared: list = [plan]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _check_resumable(
    checkpoint: Path, run: RunFolder, config: RunConfig, sizes: LiquidConfig, fingerprint: str
) -> None:
    """Raise `ConfigurationError` if a checkpoint has another model, data, batch or order of rows than this run."""
    before = run.model_config()
    for name in own_fields():
        if getattr(before, name) != getattr(sizes, name):
            raise ConfigurationError(
                f"{run.path} was trained with {name} {getattr(before, name)} and this model has {getattr(sizes, name)}; "
                "use the model that it started with, or set another output"
            )
    manifest = read_manifest(checkpoint)
    if manifest["data_fingerprint"] != fingerprint:
        raise ConfigurationError(
            f"{checkpoint} was trained on data with fingerprint {manifest['data_fingerprint'][:16]}, "
            f"but `data` has {fingerprint[:16]}; point `data` at the data of the checkpoint, or set another `output`"
        )
    described = run.read_description()["config"]
    for name, harm in (("global_batch_rows", "change its loss curve"), ("seed", "repeat some rows and skip others")):
        if described[name] != getattr(config, name):
            raise ConfigurationError(
                f"{run.path} was trained with {name} {described[name]} and now it is {getattr(config, name)}, which would "
                f"{harm}; set {name}={described[name]}, or another output"
            )


def _check_engine(run: RunFolder, resolved: dict) -> None:
    """Raise `ConfigurationError` if DeepSpeed could not load the run's checkpoints under this resolved JSON."""
    before = run.read_description().get("deepspeed", {})
    for what, read in (("ZeRO stage", zero_stage), ("precision", precision), ("optimizer", _optimizer)):
        if before and read(before) != read(resolved):
            hint = " (precision.force=true keeps a JSON's precision on a CPU)" if what == "precision" else ""
            raise ConfigurationError(
                f"{run.path} was trained with {what} {read(before)}, and now it would be {read(resolved)}, so its "
                f"checkpoints cannot be loaded; use a DeepSpeed JSON with the former{hint}, or export the run and start "
                "another one with init_from"
            )


def _optimizer(resolved: dict) -> str:
    name = str(resolved["optimizer"]["type"])
    return "AdamW" if name.lower() == "adam" else name  # both have the same moments


def _prepare(wanted: Prepare, folder: str) -> None:
    # Imported here because polars and the tokenizers are slow to import, and most starts find their data.
    from data_pipeline.preparation.prepare import prepare
    from data_pipeline.preparation.settings import Settings

    print(f"preparing {wanted.source} into {folder}", flush=True)
    settings = Settings(tokenizer=wanted.tokenizer, seq_len=wanted.seq_len, validation_share=wanted.validation_share)
    prepare(wanted.source, folder, settings)

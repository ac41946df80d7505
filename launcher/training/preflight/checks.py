"""The checks that one process can make: all of them for `lfm preflight`, the cheap ones at each start of training."""

from __future__ import annotations

from transformers import AutoTokenizer

from data_pipeline.loading.row_reader import RowReader
from launcher.config import RunConfig
from launcher.config_file import load_run_config
from launcher.deepspeed_json import spreads_experts, zero_stage
from launcher.environment import Environment
from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import has_checkpoints
from launcher.training.monitoring.validation import open_validation_data
from launcher.training.preflight.findings import GREEN, RED, YELLOW, Finding, refused
from launcher.training.preflight.gpus import check_gpus, check_ranks
from launcher.training.preflight.machine import (
    check_attention,
    check_disk,
    check_memory,
    check_precision,
    check_versions,
)
from launcher.training.setup.data_source import open_run_data, to_prepare
from launcher.training.setup.deepspeed_config import read_json, resolve_deepspeed_config
from launcher.training.setup.json_keys import check_keys
from launcher.training.setup.model_source import model_config, preset_sizes
from model import LiquidConfig


def check_start(config: RunConfig, resolved: dict, sizes: LiquidConfig, environment: Environment) -> list[str]:
    """Run the fast checks on settings and a model that are already loaded, and return the warnings.

    Raises `ConfigurationError` for the first red finding.
    """
    findings = [
        check_precision(resolved, environment),
        check_attention(config.attention, environment),
        check_disk(sizes, config.output, config.keep_checkpoints),
        check_memory(sizes, resolved, environment, seq_len=0, activations=False),
        check_versions(),
    ]
    for finding in findings:
        if finding.level == RED:
            raise ConfigurationError(f"{finding.message}; {finding.fix}")
    return [f"{finding.message}; {finding.fix}" for finding in findings if finding.level == YELLOW]


def check_run(
    config_path: str, overrides: list[str], deepspeed_path: str, world: Environment, here: bool = True
) -> list[Finding]:
    """Check a run's settings for `world`, its data and model, and this machine.

    here: whether the run will be on this machine.

    Checks that need the result of a failed one are left out.
    """
    findings = []
    config, found = refused("configuration", lambda: load_run_config(config_path, overrides))
    findings += found
    content, found = refused("DeepSpeed JSON", lambda: read_json(deepspeed_path))
    findings += found
    if config is not None:
        findings.append(Finding("configuration", GREEN, config_path))
    if content is not None:
        found = _check_json_keys(content, deepspeed_path)
        content = None if found[0].level == RED else content
        findings += found
    if config is not None:
        data, found = _check_data(config)
        findings += found
        sizes, found = _check_model(config, data)
        findings += found
        if content is not None and sizes is not None:
            findings += _check_settings(config, deepspeed_path, world, sizes, _seq_len(config, data), here)
    if here and world.device.type == "cuda":
        findings += check_ranks(world.local_world_size)
    return [*findings, check_versions(), *check_gpus()]


def _check_json_keys(content: dict, path: str) -> list[Finding]:
    _, found = refused("DeepSpeed JSON", lambda: check_keys(content, path))
    experts = "with AutoEP" if spreads_experts(content) else "without expert parallelism"
    return found or [Finding("DeepSpeed JSON", GREEN, f"{path}: ZeRO stage {zero_stage(content)} {experts}")]


def _check_data(config: RunConfig) -> tuple[RowReader | None, list[Finding]]:
    """Open the rows as training will, which checks the index and the size of each file, and check the vocabulary."""
    if missing := to_prepare(config):
        wanted, folder = missing
        message = f"{folder} does not exist yet: training prepares it from {wanted.source} first"
        return None, [Finding("data", YELLOW, message, f"lfm prepare {wanted.source} --out {folder}")]
    data, found = refused("data", lambda: open_run_data(config))
    if data is None:
        return None, found
    bad = len(getattr(data, "bad_shards", ()))
    level, skipped = (YELLOW, f"; {bad} bad shards are skipped") if bad else (GREEN, "")
    message = f"{data.location}: {data.num_rows:,} rows of {data.seq_len} tokens{skipped}"
    findings = [Finding("data", level, message, "lfm verify names the bad files" if bad else "")]
    words = len(AutoTokenizer.from_pretrained(data.tokenizer_path))
    if words > data.vocab_size:
        findings.append(Finding(
            "vocabulary", RED, f"the tokenizer in {data.tokenizer_path} has {words:,} tokens, but the data's index says "
            f"{data.vocab_size:,}", "prepare the data again with one tokenizer",
        ))  # fmt: skip
    held_out, found = refused("validation data", lambda: open_validation_data(config, data))
    rows = f"{held_out.location}: {held_out.num_rows:,} rows" if held_out else "none, so the run is not validated"
    return data, [*findings, *(found or [Finding("validation data", GREEN, rows)])]


def _seq_len(config: RunConfig, data: RowReader | None) -> int:
    """Return the tokens in a row of the data, or of the data to be prepared; 0 if it is unknown."""
    if data is not None:
        return data.seq_len
    return config.prepare.seq_len if config.prepare else 0


def _check_model(config: RunConfig, data: RowReader | None) -> tuple[LiquidConfig | None, list[Finding]]:
    """Check the model's sizes: for the data's tokenizer, or those of the preset if the data is not prepared yet."""
    if data is not None:
        run = RunFolder(config.output)
        goes_on = run if has_checkpoints(run) else None
        sizes, found = refused("model", lambda: model_config(config, data, goes_on))
        words = f"{data.vocab_size:,} tokens in a vocabulary of {{}}, rows of {data.seq_len} tokens in {{}} positions"
    elif to_prepare(config) and config.init_from is None:
        sizes, found = refused("model", lambda: preset_sizes(config.model))
        words = "a vocabulary of {}, {} positions"
    else:
        return None, []
    if sizes is None:
        return None, found
    if _seq_len(config, data) > sizes.max_position_embeddings:
        return sizes, [Finding(
            "model", RED, f"prepare.seq_len is {_seq_len(config, data)}, but the model has "
            f"{sizes.max_position_embeddings} positions", "set a smaller prepare.seq_len, or use a model with more positions",
        )]  # fmt: skip
    name = config.init_from or config.model
    if data is not None and goes_on:
        name = f"the model of the run {goes_on.path}"
    return sizes, [
        Finding(
            "model", GREEN, f"{name}: " + words.format(f"{sizes.vocab_size:,}", f"{sizes.max_position_embeddings:,}")
        )
    ]


def _check_settings(
    config: RunConfig, deepspeed_path: str, world: Environment, sizes: LiquidConfig, seq_len: int, here: bool
) -> list[Finding]:
    """Check what depends on the JSON, the run's keys and the world together: batch, experts and machine."""
    answer, found = refused("batch", lambda: resolve_deepspeed_config(deepspeed_path, config, world, sizes.num_experts))
    if answer is None:
        return found
    resolved, config, _ = answer
    rows, micro, steps = (
        resolved[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    findings = [
        Finding("batch", GREEN, f"{rows} rows = {world.world_size} processes × {micro} rows × {steps} micro-batches")
    ]
    findings += _check_experts(config.expert_parallel_size, resolved, world, sizes)
    return [
        *findings,
        check_precision(resolved, world),
        check_attention(config.attention, world),
        check_memory(sizes, resolved, world, seq_len, activations=True, here=here),
        check_disk(sizes, config.output, config.keep_checkpoints),
    ]


def _check_experts(asked: int, resolved: dict, world: Environment, sizes: LiquidConfig) -> list[Finding]:
    experts = resolved.get("expert_parallel")
    if not experts:
        return [Finding("experts", GREEN, f"{sizes.num_experts}, all on each rank")]
    used = experts["autoep_size"]
    message = f"{sizes.num_experts} experts over {used} of {world.world_size} processes"
    if used != asked:
        return [
            Finding(
                "experts",
                YELLOW,
                f"{message}, because expert_parallel_size {asked} does not divide both",
                f"set expert_parallel_size={used}",
            )
        ]
    if used > world.local_world_size:
        return [
            Finding(
                "experts",
                YELLOW,
                f"{message}: their all-to-all crosses nodes of {world.local_world_size}",
                f"set expert_parallel_size={world.local_world_size} if the network is slow",
            )
        ]
    return [Finding("experts", GREEN, message)]

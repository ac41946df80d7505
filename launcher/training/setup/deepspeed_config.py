"""Resolve every `"auto"` in the DeepSpeed JSON from the run configuration, the world and the device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from launcher.config import RunConfig
from launcher.deepspeed_json import PRECISIONS, precision, value_at
from launcher.environment import Environment
from launcher.errors import ConfigurationError
from launcher.training.setup.json_keys import AUTOEP, OPTIMIZERS, SECTIONS, check_keys

# Numbers of the JSON that are also keys of the run configuration.
SHARED_NUMBERS = {
    "train_batch_size": "global_batch_rows",
    "train_micro_batch_size_per_gpu": "micro_batch_rows",
    "gradient_clipping": "gradient_clipping",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "expert_parallel.autoep_size": "expert_parallel_size",
    "activation_checkpointing.enabled": "activation_checkpointing",
}

# What else may be "auto".
FILLED = {*SHARED_NUMBERS, "gradient_accumulation_steps", "expert_parallel.use_grouped_mm"}


def resolve_deepspeed_config(
    path: str | Path, config: RunConfig, environment: Environment, num_experts: int
) -> tuple[dict, RunConfig, list[str]]:
    """Return the JSON ready for DeepSpeed, the run configuration that agrees with it, and notes for the user.

    A number in the JSON wins over a default of the run configuration.

    Raises `ConfigurationError` for

    - a missing or broken file
    - wrong or missing keys and sections
    - different numbers in the JSON and the run configuration
    - an `"auto"` that is not supported
    - a batch that does not divide over the ranks
    """
    resolved = read_json(path)
    automatic = _automatic(resolved)
    _check_keys(resolved, automatic, str(path))
    config = _agree(resolved, config, str(path))
    notes: list[str] = []
    _resolve_precision(resolved, config.precision.force, environment, notes)
    _resolve_optimizer(resolved, environment, notes)
    _resolve_batch(resolved, config.global_batch_rows, config.micro_batch_rows, environment.world_size)
    _resolve_experts(resolved, config.expert_parallel_size, environment, num_experts, notes)
    places = [".".join(keys) for keys in automatic if keys[0] in resolved]
    filled = [f"{place} {json.dumps(value_at(resolved, place))}" for place in places]
    return resolved, config, [*notes, f'"auto" in {path}: {", ".join(filled)}'] if filled else notes


def _automatic(content: object, keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of keys to each `"auto"` in `content`."""
    if isinstance(content, dict):
        return [place for key, value in content.items() for place in _automatic(value, (*keys, key))]
    return [keys] if content == "auto" else []


def _check_keys(content: dict, automatic: list[tuple[str, ...]], path: str) -> None:
    """Raise `ConfigurationError` for settings that DeepSpeed would ignore or overwrite, or that would make it crash."""
    for name in SECTIONS:
        if not isinstance(content.get(name, {}), dict):
            raise ConfigurationError(f"{name} in {path} must be an object with keys, not {json.dumps(content[name])}")
    check_keys(content, path)
    for keys in automatic:
        if (place := ".".join(keys)) not in FILLED:
            raise ConfigurationError(f'{place} is "auto" in {path}, but "auto" is not supported there; write a value')
    kind = content.get("optimizer", {}).get("type")
    if not kind:
        raise ConfigurationError(f'{path} has no optimizer.type; write one, such as "optimizer": {{"type": "AdamW"}}')
    if str(kind).lower() not in OPTIMIZERS:
        raise ConfigurationError(
            f"optimizer.type is {json.dumps(kind)} in {path}; only {' and '.join(OPTIMIZERS.values())} are supported"
        )
    if value_at(content, "zero_optimization.stage") not in (1, 2, 3):
        raise ConfigurationError(
            f"{path} has no zero_optimization.stage of 1, 2 or 3, and without ZeRO DeepSpeed does not skip steps with "
            "non-finite gradients; set one of these stages"
        )
    if all(value_at(content, f"{name}.enabled") for name in PRECISIONS):
        raise ConfigurationError(f"fp16 and bf16 are both enabled in {path}; disable one of them")


def read_json(path: str | Path) -> dict:
    """Return the object in a JSON file; raises `ConfigurationError` if it cannot be read or is not an object."""
    try:
        content = json.loads(Path(path).read_text(), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the DeepSpeed configuration {path}: {error.strerror}; the usual one is ds_configs/zero3.json"
        ) from error
    except ValueError as error:  # not JSON, or not text
        raise ConfigurationError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a JSON object")
    return content


def _as_typed(value: Any, wanted: Any, location: str, path: str) -> Any:
    """Convert a value of the JSON to the type of the run's key.

    DeepSpeed would accept 4.0 rows or a number in quotes, and fail later.
    """
    if value == "auto" or value is None:
        return "auto"
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    fits = (
        isinstance(value, bool)
        if isinstance(wanted, bool)
        else numbers and (type(wanted) is float or value == int(value))
    )
    if not fits:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(wanted)]
        raise ConfigurationError(f'{location} is {json.dumps(value)} in {path}; it must be {kind}, or "auto"')
    return type(wanted)(value)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice} occurs twice")
    return content


def _agree(resolved: dict, config: RunConfig, path: str) -> RunConfig:
    """Fill every `"auto"` from the run configuration, and return the configuration with the JSON's own numbers.

    Raises `ConfigurationError` if the user has set a key to another number than the JSON.
    """
    from_json = {}
    for location, key in SHARED_NUMBERS.items():
        *parents, last = location.split(".")
        section = resolved
        for parent in parents:
            if parent == "expert_parallel" and parent not in section:
                break  # `_resolve_experts` notes that experts are not distributed
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigurationError(f"{parent} in {path} must be an object with keys, not {section!r}")
        else:
            wanted = getattr(config, key)
            section[last] = _as_typed(section.get(last, "auto"), wanted, location, path)
            # A number that is missing in the JSON is "auto" as well, since DeepSpeed's default may be another one.
            if section.get(last, "auto") == "auto":
                section[last] = wanted
            elif section[last] != wanted and key in config.explicit:
                raise ConfigurationError(
                    f"{location} is {section[last]} in {path} but {key} is {wanted} in the run configuration; "
                    'make them equal, or write "auto" in the JSON'
                )
            else:
                from_json[key] = section[last]
    return dataclasses.replace(config, **from_json)


def _resolve_precision(resolved: dict, force: bool, environment: Environment, notes: list[str]) -> None:
    """Unless `force`, replace a half precision that a CPU does not support natively.

    By bf16 if that is native, otherwise by fp32.
    """
    asked = precision(resolved)
    if environment.device.type != "cpu" or asked == "fp32" or force:
        return
    native = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    if asked == native:
        return
    del resolved[asked]
    if native == "bf16":
        resolved["bf16"] = {"enabled": True}
    used = "bf16, which this CPU supports natively," if native == "bf16" else "fp32"
    notes.append(f"{asked} is slow on this CPU: training in {used} instead (precision.force=true keeps {asked})")


def _resolve_optimizer(resolved: dict, environment: Environment, notes: list[str]) -> None:
    """Use torch's AdamW on a CPU: DeepSpeed's needs a compiler, and a resumed run would differ in the last bits."""
    parameters = resolved["optimizer"]["params"]
    if environment.device.type != "cpu" or parameters.get("torch_adam"):
        return
    if "offload_optimizer" in resolved["zero_optimization"]:
        return
    parameters.update(torch_adam=True, fused=True)
    notes.append("on a CPU the optimizer is torch's fused AdamW, as if the JSON had torch_adam and fused")


def _resolve_batch(resolved: dict, rows: int, micro_batch_rows: int, world: int) -> None:
    share, rest = divmod(rows, world)
    if rest:
        raise ConfigurationError(
            f"global_batch_rows is {rows}, which does not divide over {world} processes; "
            f"the nearest that do are {max(1, share) * world} and {(share + 1) * world}"
        )
    micro = max(size for size in range(1, min(share, micro_batch_rows) + 1) if share % size == 0)
    accumulation = share // micro
    if resolved.get("gradient_accumulation_steps", "auto") not in ("auto", accumulation):
        raise ConfigurationError(
            f"gradient_accumulation_steps is {resolved['gradient_accumulation_steps']} in the JSON, but {rows} rows over "
            f'{world} processes in micro-batches of {micro} make {accumulation}; write "auto" there'
        )
    resolved.update(
        train_batch_size=rows, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation
    )


def _resolve_experts(resolved: dict, asked: int, environment: Environment, num_experts: int, notes: list[str]) -> None:
    experts = resolved.get("expert_parallel")
    if not experts or not experts.get("enabled"):
        resolved.pop("expert_parallel", None)
        if asked > 1:
            notes.append(
                f"expert_parallel_size {asked} is ignored: the JSON's expert_parallel section is "
                f"{'not enabled' if experts else 'missing'}, so each rank holds all experts"
            )
        return
    wanted = experts["autoep_size"]
    world = environment.world_size
    fits = [size for size in range(1, wanted + 1) if world % size == 0 and num_experts % size == 0]
    if fits[-1] != wanted:
        notes.append(
            f"expert_parallel_size {wanted} does not fit {world} process{'es' * (world > 1)} and {num_experts} experts: "
            f"using {fits[-1]}"
        )
    experts.update(AUTOEP, autoep_size=fits[-1])
    if experts.get("use_grouped_mm") == "auto":
        experts["use_grouped_mm"] = environment.device.type == "cuda"

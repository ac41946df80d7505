"""The one place that talks to DeepSpeed: from a model and a resolved JSON to an engine whose experts are parallel."""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.ops.adam import DeepSpeedCPUAdam

from launcher.environment import Environment
from launcher.errors import ConfigurationError
from launcher.training.adam import forget_earlier_steps
from launcher.training.weight_broadcast import return_freed_memory
from model import LiquidForCausalLM

# For what ranks wait for before the first step: rank 0, which prepares data or converts a checkpoint, and slow disks.
START_TIMEOUT = timedelta(hours=6)


def start_process_group(environment: Environment) -> None:
    """Join the other ranks, waiting for them for hours: gloo between CPUs, NCCL between GPUs."""
    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by their older names, several times a step; the advice is not for whoever trains.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    if not torch.distributed.is_initialized():
        # DeepSpeed would compile its shared-memory collectives now. Steps of two ranks are no faster with them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if environment.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=START_TIMEOUT)


def limit_collectives(limit: timedelta) -> None:
    """From now on a collective that waits for longer fails, in every group that this process is in.

    New groups begin with torch's own limit: 10 minutes with NCCL, 30 with gloo.
    """
    for group in torch.distributed.distributed_c10d._world.pg_map:
        torch.distributed.distributed_c10d._set_pg_timeout(limit, group)


def build_engine(model: LiquidForCausalLM, resolved: dict) -> deepspeed.DeepSpeedEngine:
    """Hand the model to DeepSpeed as the resolved JSON says.

    Raises `ConfigurationError` where the precision cannot run on this device, and `RuntimeError` where a mixture of
    experts was not made expert-parallel: AutoEP only warns then, and every rank would train all the experts.
    """
    if resolved.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigurationError(
            "the JSON asks for fp16, which DeepSpeed does not run on this device; "
            "leave precision.force out, or train where fp16 is native"
        )
    checkpointing = resolved.pop("activation_checkpointing", {})
    if checkpointing.pop("enabled", False):
        deepspeed.checkpointing.configure(
            None, deepspeed_config={**resolved, "activation_checkpointing": checkpointing}
        )
        model._set_gradient_checkpointing(True, deepspeed.checkpointing.checkpoint)
    # DeepSpeed collects garbage after each layer whose experts it has spread. (A list of the parameters, handed over
    # here, would keep them all.)
    gc.callbacks.append(return_freed_memory)
    with muon_not_compiled():
        engine, *_ = deepspeed.initialize(model=model, config=resolved)
    gc.callbacks.remove(return_freed_memory)
    limit_collectives(START_TIMEOUT)  # DeepSpeed has made groups of its own
    engine.train()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO wraps it
    if isinstance(optimizer, DeepSpeedCPUAdam):
        optimizer.register_step_pre_hook(forget_earlier_steps)
    if resolved.get("expert_parallel", {}).get("enabled"):
        parallel = sum(isinstance(module, AutoEPMoELayer) for module in engine.module.modules())
        if parallel != model.config.num_hidden_layers:
            raise RuntimeError(
                f"{parallel} of {model.config.num_hidden_layers} mixtures of experts became expert-parallel; "
                "moe_layer_pattern in launcher/training/setup/json_keys.py does not match the model's modules"
            )
    return engine


@contextmanager
def muon_not_compiled() -> Iterator[None]:
    """Keep DeepSpeed from loading torch's compiler for an optimizer that is not used: a second of each start.

    It asks whether the optimizer is its own Muon, and on importing that decorates three functions with `torch.compile`.
    """
    with patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function):
        yield


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the rate of the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def engine_values(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """What only the engine knows of the step it has just taken, by TensorBoard tag.

    The gradient norm is infinite where fp16 overflowed and the step was skipped.
    """
    values = {
        "train/learning_rate": engine.optimizer.param_groups[0]["lr"],
        "train/grad_norm": float(engine.get_global_grad_norm()),
    }
    if engine.fp16_enabled():
        values["train/loss_scale"] = float(engine.optimizer.loss_scale)
    return values

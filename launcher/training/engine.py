"""The DeepSpeed engine: made from a model and a resolved JSON, with expert parallelism if the JSON enables it."""

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
from launcher.training.monitoring import tags
from launcher.training.weight_broadcast import return_freed_memory
from model import LiquidForCausalLM

# Before the first step ranks may wait hours for rank 0 to prepare data or convert a checkpoint, or for slow disks.
START_TIMEOUT = timedelta(hours=6)


def start_process_group(environment: Environment) -> None:
    """Join the process group: gloo between CPUs, NCCL between GPUs. Waits up to `START_TIMEOUT` for the other ranks."""
    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by deprecated names several times a step. Users cannot do anything about these warnings.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    if not torch.distributed.is_initialized():
        # Keep DeepSpeed from compiling its shared-memory collectives. They don't make steps of two ranks faster.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if environment.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=START_TIMEOUT)


def limit_collectives(limit: timedelta) -> None:
    """Set the timeout of collectives in every group that this process belongs to.

    Groups created later have torch's default: 10 minutes with NCCL, 30 with gloo.
    """
    for group in torch.distributed.distributed_c10d._world.pg_map:
        torch.distributed.distributed_c10d._set_pg_timeout(limit, group)


def build_engine(model: LiquidForCausalLM, resolved: dict) -> deepspeed.DeepSpeedEngine:
    """Build the DeepSpeed engine for a model and a resolved JSON.

    Raises `ConfigurationError` if this device does not support the precision, and `RuntimeError` if a mixture of experts
    was not made expert-parallel: AutoEP only warns then, and every rank would train all experts.
    """
    if resolved.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigurationError(
            "the JSON enables fp16, which DeepSpeed does not support on this device; "
            "remove precision.force, or train on a device with native fp16"
        )
    checkpointing = resolved.pop("activation_checkpointing", {})
    if checkpointing.pop("enabled", False):
        deepspeed.checkpointing.configure(
            None, deepspeed_config={**resolved, "activation_checkpointing": checkpointing}
        )
        model._set_gradient_checkpointing(True, deepspeed.checkpointing.checkpoint)
    # DeepSpeed runs the garbage collector after it distributes the experts of a layer. Give the freed memory back to the
    # system at that point. Do not
    # pass a list of parameters to `initialize`: it would keep all of them alive.
    gc.callbacks.append(return_freed_memory)
    with muon_not_compiled():
        engine, *_ = deepspeed.initialize(model=model, config=resolved)
    gc.callbacks.remove(return_freed_memory)
    limit_collectives(START_TIMEOUT)  # includes the groups that DeepSpeed has just created
    engine.train()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO wraps it
    if isinstance(optimizer, DeepSpeedCPUAdam):
        optimizer.register_step_pre_hook(forget_earlier_steps)
    if resolved.get("expert_parallel", {}).get("enabled"):
        parallel = sum(isinstance(module, AutoEPMoELayer) for module in engine.module.modules())
        if parallel != model.config.num_hidden_layers:
            raise RuntimeError(
                f"only {parallel} of {model.config.num_hidden_layers} mixtures of experts became expert-parallel; "
                "make moe_layer_pattern in launcher/training/setup/json_keys.py match the model's modules"
            )
    return engine


@contextmanager
def muon_not_compiled() -> Iterator[None]:
    """Keep DeepSpeed from loading torch's compiler for its Muon optimizer, which takes a second of each start.

    DeepSpeed imports Muon to compare its type, and that import decorates three functions with `torch.compile`.
    """
    with patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function):
        yield


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the learning rate of the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def engine_values(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """Return the engine's figures of the step just taken, by TensorBoard tag.

    The gradient norm is infinite if fp16 overflowed and the step was skipped.
    """
    values = {
        tags.LEARNING_RATE: engine.optimizer.param_groups[0]["lr"],
        tags.GRADIENT_NORM: float(engine.get_global_grad_norm()),
    }
    if engine.fp16_enabled():
        values[tags.LOSS_SCALE] = float(engine.optimizer.loss_scale)
    return values

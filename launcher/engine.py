"""The one place that talks to DeepSpeed: from a model and a resolved JSON to an engine whose experts are parallel."""

from __future__ import annotations

import launcher.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import ctypes
import functools
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
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
from model import LiquidForCausalLM

# For what ranks wait for before the first step: rank 0, which prepares data or converts a checkpoint, and slow disks.
START_TIMEOUT = timedelta(hours=6)
LARGE = 2**20  # bytes of a tensor that is worth a call to the C library
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


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


@torch.no_grad()
def fill_from_rank_0(
    model: LiquidForCausalLM, read: Callable[[str], torch.Tensor] | None, resolved: dict
) -> LiquidForCausalLM:
    """Give a model on the meta device its weights, in the precision and on the device that it is trained in.

    `read(name)` gives a tensor of the state dict, each once, on rank 0, which sends it to the others. Under ZeRO-3
    DeepSpeed cuts each parameter at once, so that no other rank ever holds more than one of them whole (AutoEP later
    gathers a layer's experts at a time); the buffers, a few numbers, stay whole.
    """
    device = torch.device(get_accelerator().current_device_name())
    dtype = next((HALF[name] for name in HALF if resolved.get(name, {}).get("enabled")), torch.float32)
    is_main = torch.distributed.get_rank() == 0
    is_cut = resolved.get("zero_optimization", {}).get("stage") == 3
    send = _sender_of_parts(resolved) if is_cut else functools.partial(torch.distributed.broadcast, src=0)

    def own(name: str, meta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return read(name).to(device, dtype) if is_main else torch.empty(meta.shape, dtype=dtype, device=device)

    for prefix, module in model.named_modules():
        for name, meta in list(module.named_buffers(recurse=False)):
            buffer = own(f"{prefix}.{name}", meta, meta.dtype)
            torch.distributed.broadcast(buffer, src=0)
            module.register_buffer(name, buffer)
        for name, meta in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}"
            if full_name in model.all_tied_weights_keys:
                continue
            parameter = torch.nn.Parameter(own(full_name, meta, dtype))
            setattr(module, name, parameter)
            send(parameter)
            del parameter
            if meta.nbytes > LARGE:
                _return_freed_memory()
    for tied, source in model.all_tied_weights_keys.items():
        module, _, name = tied.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))
    return model


def _sender_of_parts(resolved: dict) -> Callable[[torch.nn.Parameter], None]:
    """Give a function that sends rank 0's parameter and leaves each rank its part of it, as the JSON says."""
    earlier = []

    def send(parameter: torch.nn.Parameter) -> None:
        if earlier:
            earlier[0].convert_to_zero_parameters(param_list=[parameter])
        else:  # DeepSpeed takes a module once; its parameters then know how to take others
            deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=resolved)
            earlier.append(parameter)

    return send


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
    gc.callbacks.append(_return_freed_memory)
    with muon_not_compiled():
        engine, *_ = deepspeed.initialize(model=model, config=resolved)
    gc.callbacks.remove(_return_freed_memory)
    limit_collectives(START_TIMEOUT)  # DeepSpeed has made groups of its own
    engine.train()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO wraps it
    if isinstance(optimizer, DeepSpeedCPUAdam):
        optimizer.register_step_pre_hook(_forget_earlier_steps)
    if resolved.get("expert_parallel", {}).get("enabled"):
        parallel = sum(isinstance(module, AutoEPMoELayer) for module in engine.module.modules())
        if parallel != model.config.num_hidden_layers:
            raise RuntimeError(
                f"{parallel} of {model.config.num_hidden_layers} mixtures of experts became expert-parallel; "
                "moe_layer_pattern in launcher/settings/json_keys.py does not match the model's modules"
            )
    return engine


@contextmanager
def muon_not_compiled() -> Iterator[None]:
    """Keep DeepSpeed from loading torch's compiler for an optimizer that is not used: a second of each start.

    It asks whether the optimizer is its own Muon, and on importing that decorates three functions with `torch.compile`.
    """
    with patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function):
        yield


def _return_freed_memory(phase: str = "stop", _: dict | None = None) -> None:
    """Have the C library hand back what was freed, of which it would keep as much again as a partitioned model takes."""
    if phase == "stop" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _forget_earlier_steps(optimizer: DeepSpeedCPUAdam, *_) -> None:
    """Make a step's bias correction a function of the step alone, so that a resumed run is exact.

    The kernel keeps running products of the betas over consecutive steps, but takes a power when the step number jumps,
    as it does in a new process: the same step then differs in the last bit. A step far away on a tensor of one zero
    makes every real step a jump.
    """
    group = optimizer.param_groups[0]
    one_zero = [torch.zeros(1) for _ in range(4)]  # parameter, gradient and both moments
    optimizer.ds_opt_adam.adam_update(
        optimizer.opt_id, 1 << 30, 0.0, *group["betas"], group["eps"], 0.0, True, *one_zero
    )  # fmt: skip


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

"""A model's weights from rank 0 to all ranks, one tensor at a time."""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import ctypes
import functools
import sys
from collections.abc import Callable

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from model import LiquidForCausalLM

LARGE = 2**20  # bytes of a tensor that is worth a call to the C library
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


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
                return_freed_memory()
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


def return_freed_memory(phase: str = "stop", _: dict | None = None) -> None:
    """Have the C library hand back what was freed, of which it would keep as much again as a partitioned model takes."""
    if phase == "stop" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)

"""Send a model's weights from rank 0 to all ranks, one tensor at a time."""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import ctypes
import functools
import sys
from collections.abc import Callable

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from launcher.deepspeed_json import precision, zero_stage
from model import LiquidForCausalLM

# Size of a tensor in bytes. After a larger one, freed memory is returned to the system.
LARGE = 2**20
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def fill_from_rank_0(
    model: LiquidForCausalLM, read: Callable[[str], torch.Tensor] | None, resolved: dict
) -> LiquidForCausalLM:
    """Fill a model on the meta device with weights, in the precision and on the device of training.

    read: returns the named tensor of the state dict. It is called on rank 0 only, once for each tensor; rank 0 sends the
    tensor to the other ranks.

    Under ZeRO-3 DeepSpeed partitions each parameter immediately, so other ranks never hold more than one whole parameter
    here (AutoEP later gathers the experts of one layer at a time). The buffers are small and stay whole.
    """
    device = torch.device(get_accelerator().current_device_name())
    dtype = HALF.get(precision(resolved), torch.float32)
    is_main = torch.distributed.get_rank() == 0
    send = (
        _sender_of_parts(resolved)
        if zero_stage(resolved) == 3
        else functools.partial(torch.distributed.broadcast, src=0)
    )

    def own(name: str, meta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if read is not None and is_main:
            return read(name).to(device, dtype)
        return torch.empty(meta.shape, dtype=dtype, device=device)

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
    """Return a function that sends rank 0's parameter and leaves each rank with its partition of it."""
    earlier: list = []

    def send(parameter: torch.nn.Parameter) -> None:
        if earlier:
            earlier[0].convert_to_zero_parameters(param_list=[parameter])
        else:  # a module can only be initialised once; its first parameter then partitions all later ones
            deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=resolved)
            earlier.append(parameter)

    return send


def return_freed_memory(phase: str = "stop", _: dict | None = None) -> None:
    """Return freed memory to the system.

    Otherwise the C library keeps about as much freed memory as a partitioned model needs. The signature is that of a
    callback in `gc.callbacks`.
    """
    if phase == "stop" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)

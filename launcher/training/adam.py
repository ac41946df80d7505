"""DeepSpeed's CPU Adam, made exact over a restart."""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam


def forget_earlier_steps(optimizer: DeepSpeedCPUAdam, *_) -> None:
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

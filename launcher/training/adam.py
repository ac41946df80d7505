"""A fix for DeepSpeed's CPU Adam that makes resumed runs exact."""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam


def forget_earlier_steps(optimizer: DeepSpeedCPUAdam, *_: object) -> None:
    """Make the bias correction of a step depend on the step number only, so that a resumed run is exact.

    The kernel multiplies the powers of the betas from step to step, but computes them directly if the step number
    jumps, as in a new process. The same step then differs in the last bit. A dummy step with a distant number, on a tensor
    of one zero, makes every real step a jump.
    """
    group = optimizer.param_groups[0]
    one_zero = [torch.zeros(1) for _ in range(4)]  # parameter, gradient and both moments
    optimizer.ds_opt_adam.adam_update(
        optimizer.opt_id, 1 << 30, 0.0, *group["betas"], group["eps"], 0.0, True, *one_zero
    )

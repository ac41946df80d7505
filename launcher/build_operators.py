"""Compile DeepSpeed's operators for this machine, so that the first training step need not wait for a compiler.

They lie in the environment's own folder (`launcher.environment`), so a new environment never meets the leftovers, or the
lock of an interrupted build, of an old one.
"""

from __future__ import annotations

import launcher.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import torch

from launcher.environment import detect_environment, export_for_torch


def main() -> None:
    export_for_torch(detect_environment())
    from deepspeed.accelerator import get_accelerator

    names = ["FusedAdamBuilder", "CPUAdamBuilder"]  # the latter for zero3_offload.json, on GPUs too
    if not torch.cuda.is_available():
        names.append("ShareMemCommBuilder")
    for name in names:
        print(f"compiling {name.removesuffix('Builder')}", flush=True)
        get_accelerator().get_op_builder(name)().load()


if __name__ == "__main__":
    main()

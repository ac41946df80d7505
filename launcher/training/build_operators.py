"""Compile DeepSpeed's CPU Adam, so that the first start with `zero3_offload.json` need not wait for a compiler.

    python -m launcher.training.build_operators

No other configuration of `ds_configs/` compiles anything. The operator lies in the environment's own folder
(`launcher.environment`), so a new environment never meets the leftovers, or the lock of an interrupted build, of an old one.
"""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

from launcher.environment import detect_environment
from launcher.process import export_for_torch


def main() -> None:
    export_for_torch(detect_environment())
    from deepspeed.accelerator import get_accelerator

    print("compiling CPUAdam", flush=True)
    get_accelerator().get_op_builder("CPUAdamBuilder")().load()


if __name__ == "__main__":
    main()

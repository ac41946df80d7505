"""Compile DeepSpeed's CPU Adam in advance, so that the first start with `zero3_offload.json` does not wait for it.

    python -m launcher.training.build_operators

The other configurations in `ds_configs/` compile nothing. The operator is stored in a folder of the current environment
(`launcher.environment`), so a new environment never finds old builds, or the lock of an interrupted one.
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

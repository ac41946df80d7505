"""DeepSpeed's state files, which are pickles: read without running code that somebody has put into one."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from launcher.errors import ConfigurationError


def load_state(path: Path) -> dict:
    """Map a state file into memory, if it holds tensors, plain values and DeepSpeed's own few classes alone.

    Raises `ConfigurationError`, which names what else it asks for: loading it would run code.
    """
    with torch.serialization.safe_globals(_own_classes()):
        try:
            return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            named = next(
                (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), str(error)
            )
            raise ConfigurationError(
                f"{path} is not a training state as DeepSpeed writes it, and loading it could run foreign code "
                f"({' '.join(named.split())[:200]}); take checkpoints from people whom you trust, or export theirs anew"
            ) from error


def check_states(checkpoint: Path) -> None:
    """Raise `ConfigurationError` for a checkpoint that holds more than training states; DeepSpeed loads whatever is there."""
    for path in sorted(checkpoint.rglob("*.pt")):
        load_state(path)


def _own_classes() -> list[type]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

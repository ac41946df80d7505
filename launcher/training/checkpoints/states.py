"""Read DeepSpeed's state files, which are pickles, without running code that they may contain."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from launcher.errors import ConfigurationError


def load_state(path: Path) -> dict:
    """Map a state file into memory if it holds only tensors, plain values and a few classes of DeepSpeed.

    Otherwise loading it could run code; raises `ConfigurationError` that names what else the file asks for.
    """
    with torch.serialization.safe_globals(_own_classes()):
        try:
            return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            named = next(
                (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), str(error)
            )
            raise ConfigurationError(
                f"{path} is not a training state written by DeepSpeed, and loading it could run foreign code "
                f"({' '.join(named.split())[:200]}); use checkpoints from sources that you trust, or ask for an export"
            ) from error


def check_states(checkpoint: Path) -> None:
    """Raise `ConfigurationError` if a checkpoint holds more than training states; DeepSpeed itself loads anything."""
    for path in sorted(checkpoint.rglob("*.pt")):
        load_state(path)


def _own_classes() -> list:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

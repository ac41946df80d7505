"""Load a checkpoint's weights, moments and counts into an engine, which keeps its own settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.training.checkpoints.checkpoint import TrainState, read_train_state
from launcher.training.checkpoints.manifest import read_manifest
from model.moe import set_balancing_bias

if TYPE_CHECKING:
    import deepspeed

# The state of a dynamic loss scaler; its other attributes are settings.
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> TrainState:
    """Load a checkpoint's weights, optimizer state and balancing bias into the engine and return its train state.

    Betas, weight decay, clipping and loss scaling keep the values that the engine was built with, because the user's
    current settings apply. `folder` may be a universal checkpoint or a normal one; an engine that loaded a universal one
    may later roll back to one of its own.
    """
    engine._config.load_universal_checkpoint = "source" in read_manifest(folder)
    with _settings_kept(engine.optimizer):
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    _give_each_parameter_its_step(getattr(engine.optimizer, "optimizer", engine.optimizer))
    state = read_train_state(folder)
    set_balancing_bias(engine.module, torch.tensor(state.balancing_bias))
    return state


@contextmanager
def _settings_kept(optimizer: Any) -> Iterator[None]:
    """Restore the optimizer's settings on exit, because DeepSpeed's loading replaces them with the checkpoint's."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    clipping, scaler = optimizer.clip_grad, optimizer.loss_scaler
    yield
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    optimizer.clip_grad = clipping
    saved = optimizer.loss_scaler
    if type(saved) is type(scaler) and scaler.dynamic:
        for name in SCALER_STATE:
            setattr(scaler, name, getattr(saved, name))
    optimizer.loss_scaler, optimizer.dynamic_loss_scale = scaler, scaler.dynamic


def _give_each_parameter_its_step(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter of torch's Adam its own step tensor.

    From a universal checkpoint under ZeRO-3, DeepSpeed gives all parameters the same tensor, which every parameter's
    update would advance. From a checkpoint of DeepSpeed's own Adam, it gives a plain number.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one; DeepSpeed's own are not
        return
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for parameter, state in optimizer.state.items():
        if "step" in state:
            device = parameter.device if on_device else "cpu"
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=device)

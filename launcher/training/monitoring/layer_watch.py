"""Figures from inside the model every `monitor.every` steps: activations, their gradients, and gradient norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from launcher.config import Monitor
from launcher.training.monitoring import tags
from launcher.training.monitoring.activation_monitor import ActivationMonitor
from launcher.training.monitoring.gradient_norms import gradient_norms

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TAGS = {"activations": tags.ACTIVATIONS, "gradients": tags.GRADIENTS}  # by the kinds of activation_monitor.py


class LayerWatch:
    """Measure every `settings.every`-th step (0: none). All ranks must make the same calls."""

    def __init__(self, engine: DeepSpeedEngine, settings: Monitor):
        self.engine = engine
        self.every = settings.every
        self.values: dict[str, float] = {}
        self.warnings: list[str] = []
        self._looks = False
        self._activations = ActivationMonitor(engine.module, settings.layers) if self.every else None

    def looks_at(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def step_begins(self, step: int) -> None:
        self.values, self.warnings = {}, []
        self._looks = self.looks_at(step)
        if self._activations is None:
            return
        if self._looks:
            self._activations.begin(self.engine.device)
        else:
            self._activations.stop()  # the previous step may have been skipped before its backward

    def backward_ended(self) -> None:
        """Collect `values` (by TensorBoard tag) and `warnings` after the last backward of a measured step."""
        engine = self.engine
        if self._activations is None or not self._looks or not engine.is_gradient_accumulation_boundary():
            return
        self._looks = False
        self.values = {tags.GROUP_NORM.format(group=group): norm for group, norm in gradient_norms(engine).items()}
        loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
        # The training loop multiplies the loss by the number of ranks and of micro-batches. DeepSpeed divides it by the
        # number of micro-batches and multiplies it by the loss scale. So loss scale times ranks is left.
        found = self._activations.collect(loss_scale * dist.get_world_size())
        for kind, layers in found.items():
            for layer, statistics in layers.items():
                for name, value in vars(statistics).items():
                    self.values[TAGS[kind].format(layer=layer, statistic=name)] = value
        self.warnings = self._activations.warnings(found, loss_scaled=engine.fp16_enabled())

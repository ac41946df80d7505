"""What goes on inside the model every `monitor.every` steps: activations, their gradients, the weights' gradient norms."""

from __future__ import annotations

import torch.distributed as dist

from launcher.config import Monitor
from launcher.training.monitoring.activation_monitor import ActivationMonitor
from launcher.training.monitoring.gradient_norms import gradient_norms


class LayerWatch:
    """Looks at the steps whose number divides by `settings.every` (0: at none); the same calls on all ranks."""

    def __init__(self, engine, settings: Monitor):
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
        if self._looks:
            self._activations.begin(self.engine.device)
        elif self._activations is not None:
            self._activations.stop()  # the last step may have been given up before its backward

    def backward_ended(self) -> None:
        """Gather `values` (by TensorBoard tag) and `warnings`, after the last backward of a step that is looked at."""
        engine = self.engine
        if not self._looks or not engine.is_gradient_accumulation_boundary():
            return
        self._looks = False
        self.values = {f"grad_norm/{group}": norm for group, norm in gradient_norms(engine).items()}
        loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
        # The loop multiplies by ranks and micro-batches, the engine divides by the latter and multiplies by the former.
        found = self._activations.collect(loss_scale * dist.get_world_size())
        for kind, layers in found.items():
            for name, statistics in layers.items():
                self.values |= {f"{kind}/{name}/{what}": value for what, value in vars(statistics).items()}
        self.warnings = self._activations.warnings(found, loss_scaled=engine.fp16_enabled())

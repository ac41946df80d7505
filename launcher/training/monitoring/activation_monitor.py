"""How large the activations of chosen layers are, and their gradients, every so many steps.

Activations are those of the forward alone: what activation checkpointing computes again in the backward is not counted a
second time. Their gradients are caught on the tensors that the backward goes through: where a layer is computed again,
those of the second forward.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from launcher.errors import ConfigurationError

KINDS = ("activations", "gradients")
SATURATED = 0.5  # of the largest number that the dtype holds: twice this overflows
TYPICAL_OVER = 20  # looks whose median a new one is compared with
TYPICAL_NEEDS = 3
OUT_OF_RANGE = 10.0  # times the typical rms, or a tenth of it: in one look apart, training does not do that


@dataclass(frozen=True)
class Statistics:
    """Of all values that a layer gave in a step, on all ranks; mean, rms and max_abs are of the finite ones."""

    mean: float
    rms: float
    max_abs: float
    nonfinite: float
    saturated: float


class ActivationMonitor:
    """Watches the outputs of the layers whose names match `patterns`.

    Every rank calls `begin` before the step's first forward and `collect` after its last backward, in the same steps.
    Raises `ConfigurationError` for a pattern that is none, or that no layer matches.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str]):
        self.names: list[str] = []
        self._counting = False  # this step is one to look at
        self._in_forward = False
        self._history: dict[tuple[str, str], deque[float]] = {}
        self._warned: set[tuple[str, str]] = set()
        for name, module in _matching(model, patterns):
            # Before ZeRO-3's hook, which hands on another tensor: one that the layer's own use of its output goes past.
            module.register_forward_hook(partial(self._see, len(self.names)), prepend=True)
            self.names.append(name)
        # Between these two a forward is the step's own; behind them it is one that is computed again.
        model.register_forward_pre_hook(lambda *_: self._set_in_forward(True))
        model.register_forward_hook(lambda *_: self._set_in_forward(False))

    def begin(self, device: torch.device) -> None:
        """Look at the step that follows."""
        self._counting = True
        size = (len(KINDS), len(self.names))
        # count, finite ones, saturated ones, sum, sum of squares
        self._sums = torch.zeros(*size, 5, dtype=torch.float64, device=device)
        self._largest = torch.zeros(*size, dtype=torch.float32, device=device)

    def stop(self) -> None:
        """Look no more, whether or not the step came to its end."""
        self._counting = False

    def collect(self, gradient_scale: float) -> dict[str, dict[str, Statistics]]:
        """Give the step's statistics by kind and layer, of all ranks, and look no more.

        gradient_scale: how many times too large the backward's gradients are (loss scale, ranks).
        """
        self.stop()
        dist.all_reduce(self._sums)
        dist.all_reduce(self._largest, dist.ReduceOp.MAX)
        sums, largest = self._sums.tolist(), self._largest.tolist()
        found = {}
        for kind, scale, kind_sums, kind_largest in zip(KINDS, (1.0, gradient_scale), sums, largest, strict=True):
            found[kind] = {
                name: _statistics(*values, maximum, scale)
                for name, values, maximum in zip(self.names, kind_sums, kind_largest, strict=True)
                if values[0]  # a layer behind which nothing has a gradient, has none
            }
        return found

    def warnings(self, found: dict[str, dict[str, Statistics]], loss_scaled: bool) -> list[str]:
        """Say in plain words which layers have left their range since they were last in it.

        The range: finite, far from the dtype's largest number, and within ten times and a tenth of the layer's own
        median rms in the last looks. A warning is given once, until the layer is in its range again. Gradients that
        overflow are no fault where a dynamic loss scale is there to find its place (`loss_scaled`).
        """
        said = []
        for kind, layers in found.items():
            for name, statistics in layers.items():
                if loss_scaled and kind == "gradients" and (statistics.nonfinite or statistics.saturated):
                    continue
                history = self._history.setdefault((kind, name), deque(maxlen=TYPICAL_OVER))
                fault = _fault(kind, statistics, history)
                if fault is None:
                    history.append(statistics.rms)
                    self._warned.discard((kind, name))
                elif (kind, name) not in self._warned:
                    self._warned.add((kind, name))
                    said.append(f"the {kind} of {name} {fault}")
        return said

    def _set_in_forward(self, value: bool) -> None:
        self._in_forward = value

    def _see(self, index: int, module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        if not self._counting:
            return
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if self._in_forward:
            self._add(0, index, tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._add(1, index, gradient))

    @torch.no_grad()
    def _add(self, kind: int, index: int, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        limit = SATURATED * torch.finfo(tensor.dtype).max
        size = tensor.abs()
        finite = size.isfinite()
        # Squares of 16-bit numbers in fp32, of which the norm kernel takes care not to lose small ones.
        wide = torch.where(finite, tensor, 0).to(torch.promote_types(tensor.dtype, torch.float32))
        self._sums[kind, index] += torch.stack([
            torch.tensor(float(tensor.numel()), dtype=torch.float64, device=tensor.device),
            finite.sum().double(),
            ((size > limit) & finite).sum().double(),
            wide.sum(dtype=torch.float64),
            torch.linalg.vector_norm(wide).double().square(),
        ])  # fmt: skip
        self._largest[kind, index] = torch.maximum(self._largest[kind, index], wide.abs().max().float())


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    modules = [(name, module) for name, module in model.named_modules() if name]
    chosen = set()
    for pattern in patterns:
        try:
            matched = {name for name, _ in modules if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ConfigurationError(
                f"monitor.layers has {pattern!r}, which is no regular expression: {error}"
            ) from error
        if not matched:
            known = ", ".join(name for name, _ in modules[:6])
            raise ConfigurationError(
                f"monitor.layers has {pattern!r}, which is the name of no layer; the model's begin with {known}"
            )
        chosen |= matched
    return [(name, module) for name, module in modules if name in chosen]


def _statistics(
    count: float, finite: float, saturated: float, total: float, squares: float, largest: float, scale: float
) -> Statistics:
    return Statistics(
        mean=total / max(finite, 1) / scale,
        rms=(squares / max(finite, 1)) ** 0.5 / scale,
        max_abs=largest / scale,
        nonfinite=1 - finite / count,
        saturated=saturated / count,
    )


def _fault(kind: str, statistics: Statistics, history: Sequence[float]) -> str | None:
    """What is wrong with these statistics, or None."""
    remedy = "lower learning_rate" if kind == "activations" else "lower learning_rate or gradient_clipping"
    if statistics.nonfinite:
        return f"are not finite in {statistics.nonfinite:.2%} of their values: {remedy}"
    if statistics.saturated:
        return f"are near the largest number of their dtype in {statistics.saturated:.2%} of their values: {remedy}"
    if len(history) < TYPICAL_NEEDS:
        return None
    typical = median(history)
    if statistics.rms > OUT_OF_RANGE * typical:
        return f"have grown to {statistics.rms / max(typical, 1e-300):.0f} times their usual size: {remedy}"
    if statistics.rms < typical / OUT_OF_RANGE:
        return (
            f"have shrunk from the usual rms {typical:.2g} to {statistics.rms:.2g}: the layer has all but gone silent"
        )
    return None

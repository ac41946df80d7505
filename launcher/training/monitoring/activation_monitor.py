"""Statistics of the activations of chosen layers, and of their gradients.

Activations are counted in the forward pass only: what activation checkpointing recomputes in the backward pass is not
counted twice. Gradients are caught by hooks on the tensors that the backward pass uses. If a layer is recomputed, these are
the tensors of the recomputation.
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
# A value is saturated above this share of the dtype's largest number: if it doubles, it overflows.
SATURATED = 0.5
# A layer's rms is compared with the median of its last TYPICAL_OVER measurements, once there are TYPICAL_NEEDS of them.
TYPICAL_OVER = 20
TYPICAL_NEEDS = 3
# An rms above this many times the median, or below this fraction of it, is reported. Healthy training does not move so
# far between two measurements.
OUT_OF_RANGE = 10.0


@dataclass(frozen=True)
class Statistics:
    """Statistics of all values that a layer produced in a step, over all ranks.

    mean, rms, max_abs: of the finite values. nonfinite, saturated: shares of all values, 0 to 1.
    """

    mean: float
    rms: float
    max_abs: float
    nonfinite: float
    saturated: float


class ActivationMonitor:
    """Measure the outputs of the layers whose names match `patterns`.

    In each measured step every rank calls `begin` before the first forward and `collect` after the last backward.
    Raises `ConfigurationError` if a pattern is not a regular expression, or no layer matches it.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str]):
        self.names: list[str] = []
        self._counting = False  # True while a step is measured
        self._in_forward = False
        self._history: dict[tuple[str, str], deque[float]] = {}
        self._warned: set[tuple[str, str]] = set()
        for name, module in _matching(model, patterns):
            # Run before ZeRO-3's hook, which returns another tensor. The gradient of what the layer itself does with its
            # output does not pass through that one.
            module.register_forward_hook(partial(self._see, len(self.names)), prepend=True)
            self.names.append(name)
        # A layer called between these two hooks belongs to the forward pass; outside them it is being recomputed.
        model.register_forward_pre_hook(lambda *_: self._set_in_forward(True))
        model.register_forward_hook(lambda *_: self._set_in_forward(False))

    def begin(self, device: torch.device) -> None:
        """Start measuring the coming step."""
        self._counting = True
        size = (len(KINDS), len(self.names))
        # In the last dimension: numbers of all, finite and saturated values, their sum, their sum of squares.
        self._sums = torch.zeros(*size, 5, dtype=torch.float64, device=device)
        self._largest = torch.zeros(*size, dtype=torch.float32, device=device)

    def stop(self) -> None:
        """Stop measuring, even if the step is unfinished."""
        self._counting = False

    def collect(self, gradient_scale: float) -> dict[str, dict[str, Statistics]]:
        """Stop measuring and return the step's statistics over all ranks, by kind and layer.

        gradient_scale: the factor by which the backward's gradients are too large (loss scale times ranks).
        """
        self.stop()
        dist.all_reduce(self._sums)
        dist.all_reduce(self._largest, dist.ReduceOp.MAX)
        sums, largest = self._sums.tolist(), self._largest.tolist()
        found = {}
        for kind, scale, kind_sums, kind_largest in zip(KINDS, (1.0, gradient_scale), sums, largest, strict=True):
            found[kind] = {
                name: _statistics(values, maximum, scale)
                for name, values, maximum in zip(self.names, kind_sums, kind_largest, strict=True)
                if values[0]  # a layer that no gradient reaches has no gradient statistics
            }
        return found

    def warnings(self, found: dict[str, dict[str, Statistics]], loss_scaled: bool) -> list[str]:
        """Return a sentence for each layer that has just left its normal range.

        A layer is in its normal range if its values are finite and far from the dtype's largest number, and its rms is
        between a tenth and ten times its recent median. A layer is reported once, until it is back in range.

        loss_scaled: whether a dynamic loss scale is used. Overflowing gradients are then normal and not reported.
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
        # Squares of 16-bit numbers would overflow or vanish, so the norm is taken in fp32.
        wide = torch.where(finite, tensor, 0).to(torch.promote_types(tensor.dtype, torch.float32))
        self._sums[kind, index] += torch.stack(
            [
                torch.tensor(float(tensor.numel()), dtype=torch.float64, device=tensor.device),
                finite.sum().double(),
                ((size > limit) & finite).sum().double(),
                wide.sum(dtype=torch.float64),
                torch.linalg.vector_norm(wide).double().square(),
            ]
        )
        self._largest[kind, index] = torch.maximum(self._largest[kind, index], wide.abs().max().float())


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    modules = [(name, module) for name, module in model.named_modules() if name]
    chosen = set()
    for pattern in patterns:
        try:
            matched = {name for name, _ in modules if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ConfigurationError(
                f"monitor.layers has {pattern!r}, which is not a valid regular expression: {error}"
            ) from error
        if not matched:
            known = ", ".join(name for name, _ in modules[:6])
            raise ConfigurationError(
                f"monitor.layers has {pattern!r}, which matches no layer; the first layers of the model are {known}"
            )
        chosen |= matched
    return [(name, module) for name, module in modules if name in chosen]


def _statistics(sums: Sequence[float], largest: float, scale: float) -> Statistics:
    count, finite, saturated, total, squares = sums
    return Statistics(
        mean=total / max(finite, 1) / scale,
        rms=(squares / max(finite, 1)) ** 0.5 / scale,
        max_abs=largest / scale,
        nonfinite=1 - finite / count,
        saturated=saturated / count,
    )


def _fault(kind: str, statistics: Statistics, history: Sequence[float]) -> str | None:
    """Return what is wrong with these statistics, or None."""
    remedy = "lower learning_rate" if kind == "activations" else "lower learning_rate or gradient_clipping"
    if statistics.nonfinite:
        return f"are not finite in {statistics.nonfinite:.2%} of their values; {remedy}"
    if statistics.saturated:
        return f"are close to overflow in {statistics.saturated:.2%} of their values; {remedy}"
    if len(history) < TYPICAL_NEEDS:
        return None
    typical = median(history)
    if statistics.rms > OUT_OF_RANGE * typical:
        return f"have grown to {statistics.rms / max(typical, 1e-300):.0f} times their usual size; {remedy}"
    if statistics.rms < typical / OUT_OF_RANGE:
        return f"have shrunk from their usual rms of {typical:.2g} to {statistics.rms:.2g}: the layer is almost silent"
    return None

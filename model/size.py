"""Counts of a model's parameters: all of them, and those that a single token uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from model.modeling import LiquidPreTrainedModel
from model.moe import Experts


@dataclass(frozen=True)
class ParameterCount:
    """Counts: `total` is all parameters; `routed` is the routed experts'; `active` leaves out those a token did not choose."""

    total: int
    routed: int
    active: int


def count_parameters(model: LiquidPreTrainedModel) -> ParameterCount:
    """Count the parameters, with the tied head counted once; on `meta`, a preset is counted without allocating memory.

    Call this before an engine wraps the model: ZeRO-3 leaves parameters empty, and AutoEP puts different experts on every
    rank.
    """
    total = _elements(model.parameters())
    routed = sum(_elements(module.parameters()) for module in model.modules() if isinstance(module, Experts))
    unused = model.config.num_experts - model.config.num_experts_per_tok
    return ParameterCount(total, routed, total - routed * unused // model.config.num_experts)


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)

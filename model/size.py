"""How many parameters a model has, and how many of them one token is multiplied with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from model.modeling import LiquidPreTrainedModel
from model.moe import Experts


@dataclass(frozen=True)
class ParameterCount:
    """`total` parameters, and the `active` ones: all but the routed experts that a token did not choose."""

    total: int
    active: int


def count_parameters(model: LiquidPreTrainedModel) -> ParameterCount:
    """Count whole parameters, the tied head once, on any device: on `meta` a preset is counted without its memory.

    Count before an engine takes the model: ZeRO-3 leaves empty parameters, AutoEP other experts on every rank.
    """
    total = _elements(model.parameters())
    routed = sum(_elements(module.parameters()) for module in model.modules() if isinstance(module, Experts))
    unused = model.config.num_experts - model.config.num_experts_per_tok
    return ParameterCount(total, total - routed * unused // model.config.num_experts)


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)

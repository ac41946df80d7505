"""Linear layers with their own initialisation; `_init_weights` recognises them by class."""

from __future__ import annotations

import torch
from torch import nn


class ResidualProjection(nn.Linear):
    """A linear layer that writes to the residual stream, initialised at zero.

    At zero, the layers before it do not learn from noise (Zhang 2019). With small random weights instead, the worst of
    three initialisations of `tiny` was twice as far behind the others.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class TapProjection(nn.Linear):
    """Map a token to its deformable taps: `2 G K` outputs, first the logits of the delays, then the strengths."""

    def __init__(self, in_features: int, groups: int, taps: int, delay_range: int):
        super().__init__(in_features, 2 * groups * taps)
        self.groups, self.taps, self.delay_range = groups, taps, delay_range

    def initial_bias(self) -> torch.Tensor:
        """Return the bias that gives every group the K shortest delays (½, 1½, …) at equal strength."""
        delay = torch.arange(self.taps) + 0.5
        share = (delay / max(self.delay_range - 1, 1)).clamp(max=0.95)
        logit = torch.log(share / (1 - share)).repeat(self.groups)
        return torch.cat((logit, torch.ones_like(logit)))

"""One pre-norm layer: local attention, deformable convolution, memory (in every few layers), mixture of experts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from model.attention import LocalAttention
from model.configuration import LiquidConfig
from model.convolution import DeformableConvolution
from model.documents import Documents
from model.memory import LSTMMemory
from model.moe import MixtureOfExperts, router_logits


class LiquidBlock(GradientCheckpointingLayer):
    """Apply the residual branches, each to its own normalised input: `[B, T, D]` → hidden states and router logits."""

    def __init__(self, config: LiquidConfig, layer_index: int):
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.attention_norm, self.attention = norm(), LocalAttention(config, layer_index)
        self.convolution_norm, self.convolution = norm(), DeformableConvolution(config, layer_index)
        self.has_memory = (layer_index + 1) % config.memory_every == 0
        if self.has_memory:
            self.memory_norm, self.memory = norm(), LSTMMemory(config, layer_index)
        self.moe_norm, self.moe = norm(), MixtureOfExperts(config)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        documents: Documents,
        attention_mask: torch.Tensor | BlockMask | None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = past_key_values
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, attention_mask, cache)[0]
        hidden = hidden + self.convolution(self.convolution_norm(hidden), documents, cache)
        if self.has_memory:
            hidden = hidden + self.memory(self.memory_norm(hidden), documents, cache)
        normalised = self.moe_norm(hidden)
        # The logits are part of the return value, so that recomputing the block does not count them twice.
        return hidden + self.moe(normalised), router_logits(self.moe, normalised)

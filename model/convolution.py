"""Gated deformable convolution: a few taps with learned, token-dependent delays into a bounded past.

Legend: B rows, T tokens, D channels in G groups, K taps per group, R the range of delays, L tokens in a block.

    d_tgk = (R - 1) σ(·),  α_tgk = linear, of either sign       (linear in the token; the rest in fp32)
    w_tgr = Σ_k α_tgk max(0, 1 - |d_tgk - r|),  r = 0 … R-1   (linear interpolation as "hat" weights)
    y_tg  = Σ_r w_tgr u_{t-r,g},   out = W_o(rms(y) * silu(z))

This is a causal, one-dimensional form of deformable convolution (Dai et al. 2017). The strengths have no softmax, as in
DCNv4 (Xiong et al. 2024); the norm after the sum fixes their scale. The sum over r is a banded matrix product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from model.cache import CONVOLUTION, with_past
from model.configuration import LiquidConfig
from model.documents import Documents
from model.projection import ResidualProjection, TapProjection

BLOCK = 32


class DeformableConvolution(nn.Module):
    """Convolve `[B, T, D]` → `[B, T, D]`; no tap reaches back beyond the start of its document."""

    def __init__(self, config: LiquidConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.taps = config.deformable_taps
        self.range = config.deformable_range
        self.groups = config.deformable_groups
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.tap_proj = TapProjection(config.hidden_size, self.groups, self.taps, self.range)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.out_proj = ResidualProjection(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, documents: Documents, past_key_values: Cache | None = None) -> torch.Tensor:
        signal, gate = self.in_proj(hidden).chunk(2, dim=-1)
        if past_key_values is not None:
            signal = with_past(past_key_values, signal, self.layer_index, CONVOLUTION, self.range - 1)
        weights = self.tap_weights(hidden, documents)
        mixed = banded_convolution(signal.unflatten(-1, (self.groups, -1)), weights)
        return self.out_proj(self.norm(mixed.flatten(2)) * F.silu(gate))

    def tap_weights(self, hidden: torch.Tensor, documents: Documents) -> torch.Tensor:
        """Compute the weights w_tgr, `[B, T, G, R]` in the input's dtype, zero for positions outside the document."""
        delay, strength = self.tap_proj(hidden).float().unflatten(-1, (2, self.groups, self.taps)).unbind(2)
        delay = (self.range - 1) * torch.sigmoid(delay)
        reach = torch.arange(self.range, device=hidden.device)
        hats = (1 - (delay.unsqueeze(-1) - reach).abs()).clamp(min=0)
        weights = (strength.unsqueeze(-1) * hats).sum(3)
        inside = documents.offset[..., None, None] >= reach
        return torch.where(inside, weights, 0.0).to(hidden.dtype)


def banded_convolution(signal: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute y_tg = Σ_r weights_tgr signal_{t-r,g} as a batched product with one banded matrix per block of tokens.

    `signal` `[B, P + T, G, C]` (preceded by up to R-1 past tokens), `weights` `[B, T, G, R]` → `[B, T, G, C]`. Missing
    past tokens count as zero.
    """
    tokens, reach = weights.shape[1], weights.shape[-1]
    if tokens == 1 and signal.shape[1] == reach:  # decoding: the band is one row
        return torch.matmul(weights.flip(-1).transpose(1, 2), signal.transpose(1, 2)).transpose(1, 2)
    block = max(min(BLOCK, tokens), reach - 1)
    blocks = math.ceil(tokens / block)
    surplus = blocks * block - tokens
    # Row i of the band must hold its weights at columns i … i+R-1. Padding each row by L and re-cutting the flat array
    # into rows that are one element shorter shifts each row one further to the right than the row above.
    band = F.pad(weights.flip(-1), (0, 0, 0, 0, 0, surplus)).unflatten(1, (blocks, block)).transpose(2, 3)
    width = block + reach - 1
    band = F.pad(band, (0, block)).flatten(-2)[..., : block * width].unflatten(-1, (block, width))
    # Each block's signal, preceded by the last R-1 tokens of the previous block.
    past = signal.shape[1] - tokens
    own = F.pad(signal, (0, 0, 0, 0, block - past, surplus)).unflatten(1, (blocks + 1, block))
    window = torch.cat((own[:, :-1, block - (reach - 1) :], own[:, 1:]), dim=2).transpose(2, 3)  # [B, n, G, width, C]
    mixed = torch.matmul(band, window)  # [B, n, G, L, C]
    return mixed.transpose(2, 3).flatten(1, 2)[:, :tokens]

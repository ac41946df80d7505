"""Local attention with grouped queries and rotary positions, in blocks of one window, so that its cost is linear.

Legend: B rows, T tokens, H query heads, K key/value heads, G = H / K queries a key head, d head size, W window, n blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.configuration import LiquidConfig
from model.documents import Documents
from model.projection import ResidualProjection


class LocalAttention(nn.Module):
    """Each token attends to the last `sliding_window` tokens of its own document, itself included."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.window = config.sliding_window
        self.head_dim = config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = ResidualProjection(config.hidden_size, config.hidden_size)
        # Norms on queries and keys bound the logits, whatever the activations' size (Dehghani et al. 2023).
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], documents: Documents
    ) -> torch.Tensor:
        """`hidden` `[B, T, D]` → `[B, T, D]`; `rotation` is what `RotaryPositions` returns."""
        heads = (*hidden.shape[:2], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(hidden).view(heads)), rotation).transpose(1, 2)
        key = rotate(self.k_norm(self.k_proj(hidden).view(heads)), rotation).transpose(1, 2)
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        attended = block_local_attention(query, key, value, documents.number, self.window)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class RotaryPositions(nn.Module):
    """Cosines and sines `[B, T, 1, d]` of rotary positions (Su et al. 2021), computed in fp32."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = config.rope_theta

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        angle = positions.unsqueeze(-1).float() * self.theta**-exponent
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(2)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(vectors: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn `[B, T, heads, d]` vectors by their positions' angles."""
    cosine, sine = rotation
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat((-second, first), dim=-1) * sine


def block_local_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, number: torch.Tensor, window: int
) -> torch.Tensor:
    """Exact causal sliding-window attention in O(T · W).

    `query` `[B, H, T, d]`, `key` and `value` `[B, K, T, d]`, `number` `[B, T]` (a token sees its own document only).
    Rows are cut into blocks of W queries, each against its own and the previous block's keys; the G query heads
    that share a key head are folded into the query rows, so that keys are never repeated. Returns `[B, H, T, d]`.
    """
    batch, query_heads, tokens, size = query.shape
    key_heads = key.shape[1]
    block = min(window, tokens)
    blocks = -(-tokens // block)
    surplus = blocks * block - tokens

    def split(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, surplus)).unflatten(2, (blocks, block)).transpose(1, 2)

    query, key, value = split(query), split(key), split(value)  # [B, n, heads, W, d]
    # Surplus tokens are document -1 (they see each other, so no softmax is empty); -2 stands before the row's beginning.
    number = F.pad(number, (0, surplus), value=-1).unflatten(1, (blocks, block))
    key_number = number
    if blocks > 1:
        key, value = (torch.cat((F.pad(x, (0, 0) * 3 + (1, 0))[:, :-1], x), dim=3) for x in (key, value))
        key_number = torch.cat((F.pad(number, (0, 0, 1, 0), value=-2)[:, :-1], number), dim=2)
    row = torch.arange(block, device=query.device).unsqueeze(1)
    distance = row + (key.shape[3] - block) - torch.arange(key.shape[3], device=query.device)
    mask = (number.unsqueeze(-1) == key_number.unsqueeze(-2)) & (distance >= 0) & (distance < window)

    groups = query_heads // key_heads
    folded = query.unflatten(2, (key_heads, groups)).flatten(3, 4)  # [B, n, K, G * W, d]
    mask = mask.repeat(1, 1, groups, 1).unsqueeze(2)
    attended = F.scaled_dot_product_attention(
        folded.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask=mask.flatten(0, 1)
    )
    attended = attended.view(batch, blocks, key_heads, groups, block, size).flatten(2, 3)
    return attended.transpose(1, 2).flatten(2, 3)[:, :, :tokens]

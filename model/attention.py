"""Local attention with grouped queries and rotary positions, computed in blocks of one window at linear cost.

`block_local` is registered with transformers as an attention function and a mask function, and is the default.
`attn_implementation` can select `sdpa`, `eager` or `flex_attention` instead; all give the same results.

Legend: B rows, T tokens, P past tokens in the cache, H query heads, K key/value heads, G = H / K query heads per key
head, d head size, W window, n blocks, L queries in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import create_sliding_window_causal_mask, flex_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.configuration import BLOCK_LOCAL, LiquidConfig
from model.documents import Documents
from model.projection import ResidualProjection

# For windows up to this size, two matrix products and a softmax take half the time of the fused kernel on a CPU.
SMALL_WINDOW = 128


class LocalAttention(nn.Module):
    """Attend from each token to the last `sliding_window` tokens of its own document, itself included."""

    def __init__(self, config: LiquidConfig, layer_index: int):
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.window = config.sliding_window
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = ResidualProjection(config.hidden_size, config.hidden_size)
        # Norms on queries and keys bound the logits for activations of any size (Dehghani et al. 2023).
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | BlockMask | None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend: `hidden` `[B, T, D]` → `[B, T, D]` and the weights `[B, H, T, keys]`.

        The weights are None if the implementation does not return them. `rotation` comes from `RotaryPositions`, the
        mask from `local_mask`.
        """
        heads = (*hidden.shape[:2], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(hidden).view(heads)), rotation).transpose(1, 2)
        key = rotate(self.k_norm(self.k_proj(hidden).view(heads)), rotation).transpose(1, 2)
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, weights = attend(
            self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, sliding_window=self.window
        )
        return self.o_proj(attended.flatten(2)), weights


class RotaryPositions(nn.Module):
    """Compute the cosines and sines `[B, T, 1, d]` of rotary positions (Su et al. 2021) in fp32."""

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
    """Rotate `[B, T, heads, d]` vectors by the angles of their positions."""
    cosine, sine = rotation
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat((-second, first), dim=-1) * sine


def local_mask(
    config: LiquidConfig, hidden: torch.Tensor, documents: Documents, past_key_values: Cache | None
) -> torch.Tensor | BlockMask | None:
    """Make the attention mask in the form that the selected implementation reads; one mask serves all layers.

    Token i sees token j if i - W < j ≤ i and j is in i's document, which reaches back `documents.offset` tokens.
    """
    past = past_key_values.get_seq_length() if past_key_values is not None else 0

    def same_document(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query - key <= documents.offset[row, query - past]

    return create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=past_key_values,
        and_mask_function=same_document,
    )


def block_local_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable,
    device: torch.device,
    config: LiquidConfig,
    **kwargs: Any,
) -> torch.Tensor | BlockMask:
    """Make the mask for `block_local`: bool `[B * n, 1, G * L, keys of a block]`, never `[T, T]`.

    transformers calls this as a mask function. On CUDA with gradients enabled it returns flex attention's block mask
    instead, and `block_local_attention` calls that kernel, which needs heads of at least 16. Decoding uses the blocks,
    because flex attention recompiles for every new length.
    """
    if torch.device(device).type == "cuda" and torch.is_grad_enabled() and config.head_dim >= 16:
        return flex_attention_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, None, device=device
        )
    window = config.sliding_window
    block, blocks = _blocks(q_length, window)
    lead = q_offset - kv_offset  # keys before the first query
    before = window if blocks > 1 else lead  # keys in a block before its first query
    width = before + block
    query = torch.arange(blocks * block, device=device).view(1, blocks, block, 1)
    start = torch.arange(blocks, device=device).view(1, blocks, 1, 1) * block - before
    key = start + torch.arange(width, device=device)
    row = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    seen = mask_function(row, 0, query.clamp(max=q_length - 1) + q_offset, key.clamp(max=q_length - 1) + q_offset)
    seen = seen & (key >= -lead) & (key <= query)
    # Queries that pad the last block see themselves: a softmax over no keys would not be finite.
    seen = seen | (key == query)
    groups = config.num_attention_heads // config.num_key_value_heads
    seen = seen.expand(batch_size, blocks, block, width).repeat(1, 1, groups, 1)
    return seen.flatten(0, 1).unsqueeze(1)


def block_local_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask,
    scaling: float,
    sliding_window: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute exact causal sliding-window attention in O(T · W), as an attention function of transformers.

    `query` `[B, H, T, d]`, `key` and `value` `[B, K, P + T, d]`, `attention_mask` from `block_local_mask` → `[B, T, H, d]`.
    Rows are cut into blocks of W queries. Each block attends to its own keys and those of the previous block. The G
    query heads that share a key head are folded into the query rows, so keys are never repeated.
    """
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    batch, query_heads, tokens, size = query.shape
    block, blocks = _blocks(tokens, sliding_window)
    # A static cache also returns its unused slots, after the newest token. The mask's width excludes them.
    lead = (attention_mask.shape[-1] if blocks == 1 else key.shape[2]) - tokens
    key, value = key[:, :, : lead + tokens], value[:, :, : lead + tokens]
    if blocks > 1:
        surplus = blocks * block - tokens
        query = F.pad(query, (0, 0, 0, surplus))
        key, value = (_with_block_before(x, block, lead, surplus) for x in (key, value))
    query = query.unflatten(1, (key.shape[1], -1)).unflatten(3, (blocks, block))  # [B, K, G, n, L, d]
    folded = query.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1)  # [B * n, K, G * L, d]
    key, value = (x.unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1) for x in (key, value))
    if query.device.type == "cpu" and sliding_window <= SMALL_WINDOW:
        scores = (folded * scaling @ key.transpose(2, 3)).masked_fill(~attention_mask, -torch.inf)
        attended = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    attended = attended.view(batch, blocks, query_heads, block, size).transpose(2, 3).flatten(1, 2)
    return attended[:, :tokens], None


def _blocks(tokens: int, window: int) -> tuple[int, int]:
    """Return the queries per block and the number of blocks: one if all queries fit into a window."""
    block = min(window, tokens)
    return block, -(-tokens // block)


def _with_block_before(x: torch.Tensor, block: int, lead: int, surplus: int) -> torch.Tensor:
    """Put the previous block's keys before each block's own: `[B, K, P + T, d]` → `[B, K, n * 2 L, d]`."""
    x = F.pad(x, (0, 0, block - lead, surplus)).unflatten(2, (-1, block))
    return torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3).flatten(2, 3)


def eager_attention(
    module: LocalAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention by its definition: `[B, T, H, d]` and the weights `[B, H, T, keys]`; quadratic in T."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1, dtype=torch.float32)
    return (weights.to(query.dtype) @ value).transpose(1, 2), weights


# This project's implementations by name: the attention function, and the function that makes its mask.
OWN = {BLOCK_LOCAL: (block_local_attention, block_local_mask)}
for name, (attention_function, mask_function) in OWN.items():
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, mask_function)
# All that compute this model's attention: causal, in a window, and within documents.
IMPLEMENTATIONS = (*OWN, "sdpa", "eager", "flex_attention")

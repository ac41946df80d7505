"""What decoding remembers, in transformers' own caches (`DynamicCache(config=…)`, `StaticCache(config, …)`).

The configuration calls every layer `hybrid_sliding`, for which transformers' caches hold, in each layer,

    keys, values    `[B, K, W - 1, d]`     attention's window (W in a static cache)
    convolution 0   `[B, D, R - 1]`        the deformable convolution's signal
    recurrent 0     `[B, 2 M H + D]`       the memory's h and c of M layers, and the sum of its unfinished block
                                           (layers with a memory only)
    convolution 1   `[B, D, K - 1]`        the embedding's taps            (first layer only)
    recurrent 1     `[B, D + 1]` fp64      sums of its embeddings and novelty (first layer only)

so that the state is as large after 64k tokens as after 1k. Everything has the batch first, as beam search reorders it.
transformers gives a recurrent state only after the convolution of the same number has been updated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

LAYER_TYPE = "hybrid_sliding"
CONVOLUTION = MEMORY = 0
EMBEDDING = 1
NUMBER_OF_STATES = 2


def check_cache(cache: Cache, window: int, tokens: int) -> None:
    """Raise `ValueError` for a cache that has no room for this model's states, or for `tokens` more."""
    if not cache.layers or not isinstance(cache.layers[0], LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"{type(cache).__name__} was made without this model's configuration and holds keys and values only; "
            "make it as DynamicCache(config=model.config)"
        )
    # A static cache shorter than the window takes its own length for the window.
    room = getattr(cache.layers[0], "max_cache_len", window)
    if room < window and cache.get_seq_length() + tokens > room:
        raise ValueError(
            f"the static cache has room for {room} tokens and gets {cache.get_seq_length() + tokens}; "
            f"make it with max_cache_len of all that will be read and written (from {window} on, any length fits)"
        )


def with_past(cache: Cache, signal: torch.Tensor, layer_index: int, state_index: int, past: int) -> torch.Tensor:
    """Put the last `past` tokens in the cache before `signal` `[B, T, D]` → `[B, past + T, D]`, zeros before the first.

    The cache then keeps the last `past` tokens of both.
    """
    tokens = signal.shape[1]
    known = cache.update_conv_state(
        signal.transpose(1, 2), layer_index, state_idx=state_index, conv_kernel_size=past
    ).transpose(1, 2)
    # A first call returns the tokens alone, filled up with zeros where they are fewer than the cache keeps.
    return F.pad(known, (0, 0, past + tokens - known.shape[1], 0))

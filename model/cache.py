"""The state that decoding keeps, in transformers' own caches (`DynamicCache(config=…)`, `StaticCache(config, …)`).

The configuration declares every layer as `hybrid_sliding`. For such a layer, transformers' caches hold:

    keys, values    `[B, K, W - 1, d]`     attention's window (W in a static cache)
    convolution 0   `[B, D, R - 1]`        the deformable convolution's signal
    recurrent 0     `[B, 2 M H + D]`       the memory's h and c for M LSTM layers, and the sum of its unfinished block
                                           (only in layers with a memory)
    convolution 1   `[B, D, K - 1]`        the embedding's taps (only in the first layer)
    recurrent 1     `[B, D + 1]` fp64      sums of the embeddings and their novelty (only in the first layer)

The state is therefore as large after 64k tokens as after 1k. The batch dimension comes first everywhere, because beam
search reorders it. transformers returns a recurrent state only after the convolution state of the same number has been
updated.
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
    """Raise `ValueError` if a cache cannot hold this model's states, or cannot hold `tokens` more tokens."""
    if not cache.layers or not isinstance(cache.layers[0], LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"{type(cache).__name__} was created without this model's configuration and holds only keys and values; "
            "create it with DynamicCache(config=model.config)"
        )
    # A static cache shorter than the window uses its own length as the window.
    room = getattr(cache.layers[0], "max_cache_len", window)
    if room < window and cache.get_seq_length() + tokens > room:
        raise ValueError(
            f"the static cache holds {room} tokens but would get {cache.get_seq_length() + tokens}; set its "
            f"max_cache_len to the number of tokens read and generated, or to at least {window}, which fits any length"
        )


def with_past(cache: Cache, signal: torch.Tensor, layer_index: int, state_index: int, past: int) -> torch.Tensor:
    """Prepend the last `past` tokens from the cache to `signal` `[B, T, D]` → `[B, past + T, D]`.

    Missing past tokens are zero. Afterwards the cache holds the last `past` tokens of the result.
    """
    tokens = signal.shape[1]
    known = cache.update_conv_state(
        signal.transpose(1, 2), layer_index, state_idx=state_index, conv_kernel_size=past
    ).transpose(1, 2)
    # A first call returns only the given tokens, zero-padded if they are fewer than the cache keeps.
    return F.pad(known, (0, 0, past + tokens - known.shape[1], 0))

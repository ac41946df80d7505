"""FLOPs per token, and the share of the device's peak that a run reaches.

Only matrix products are counted, with 2 FLOPs for a multiplication and addition, as in Chowdhery et al. 2022 (PaLM,
appendix B). The backward costs twice the forward. Recomputation in the backward counts in the hardware FLOPs utilisation
(HFU) but not in the model FLOPs utilisation (MFU).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from launcher.training.monitoring import tags
from model.configuration import LiquidConfig

# TFLOP/s of dense 16-bit matrix products, from the manufacturers' data sheets. The longest matching name counts.
PEAK_TERAFLOPS = {
    "B200": 2250.0, "H200": 989.4, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.4, "GH200": 989.4,
    "A100": 312.0, "A30": 165.0, "A10G": 70.0, "A10": 125.0, "A40": 149.7, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "V100": 125.0, "T4": 65.0, "RTX 6000 Ada": 364.2, "RTX A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token's forward in the blocks, the embedding and the head."""

    blocks: float
    embedding: float
    head: float

    @property
    def training(self) -> float:
        """FLOPs of one token's forward and backward."""
        return 3 * (self.blocks + self.embedding + self.head)

    def recomputed(self, checkpointing: bool) -> float:
        """Return the FLOPs recomputed in the backward: the logits (model/loss.py), and the blocks with checkpointing."""
        return self.head + (self.blocks if checkpointing else 0.0)


def token_flops(config: LiquidConfig, seq_len: int) -> TokenFlops:
    """Count the FLOPs of one token's matrix products, averaged over a full row of `seq_len` tokens.

    - Attention: token t sees min(t + 1, W) keys. Documents in a row are not known here, so this is an upper bound for rows
      with many short documents.
    - Deformable convolution: the R taps of its band.
    - LSTM: runs once every `memory_stride` tokens.
    - Embedding table: its look-up is not a product; the head, which shares its weights, is one.
    """
    width, window = config.hidden_size, min(config.sliding_window, seq_len)
    keys = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len  # mean number of keys that a token sees
    attention = 2 * width * (2 * width + 2 * config.num_key_value_heads * config.head_dim) + 2 * 2 * keys * width
    taps = 2 * config.deformable_groups * config.deformable_taps
    convolution = 2 * width * (3 * width + taps) + 2 * config.deformable_range * width
    experts = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    # The router runs twice: in the block, and for its logits (model/moe.py).
    mixture = 2 * 3 * width * experts + 2 * 2 * width * config.num_experts
    size = config.memory_hidden_size
    cells = 4 * size * (width + size) + (config.memory_num_layers - 1) * 4 * size * 2 * size
    memory = 2 * (cells + size * width) / config.memory_stride + 2 * width * width
    layers, memories = config.num_hidden_layers, config.num_hidden_layers // config.memory_every
    return TokenFlops(
        blocks=layers * (attention + convolution + mixture) + memories * memory,
        embedding=2 * (width * width + 2 * width * config.embedding_components),
        head=2 * width * config.vocab_size,
    )


def peak_flops(device: torch.device, in_16_bits: bool) -> float | None:
    """Return a device's peak FLOP/s in 16 bits; None for a CPU, an unknown device, or training in fp32."""
    if device.type != "cuda" or not in_16_bits:
        return None
    teraflops = known_teraflops(torch.cuda.get_device_name(device))
    return 1e12 * teraflops if teraflops else None


def known_teraflops(name: str) -> float | None:
    """Return the peak TFLOP/s of the GPU with this CUDA name; None for unknown GPUs, MIG slices and laptop GPUs."""
    if re.search("MIG|Laptop", name):
        return None
    # Match whole words: an A1000 is not an A100, and a GB200 not a B200.
    known = [part for part in PEAK_TERAFLOPS if re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![0-9])", name)]
    return PEAK_TERAFLOPS[max(known, key=len)] if known else None


def utilisation(
    flops: TokenFlops, checkpointing: bool, tokens_per_second: float, world_size: int, peak: float
) -> dict[str, float]:
    """Return MFU and HFU of a step by TensorBoard tag.

    tokens_per_second: of non-padding tokens, over all ranks. peak: FLOP/s of one device.
    """
    share = tokens_per_second / (world_size * peak)
    return {
        tags.MFU: share * flops.training,
        tags.HFU: share * (flops.training + flops.recomputed(checkpointing)),
    }

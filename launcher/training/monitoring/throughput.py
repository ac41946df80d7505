"""How much arithmetic a token costs, and what share of the device's peak that makes (model FLOPs utilisation, MFU).

Counted are the products of matrices, 2 FLOPs a multiplication and addition, as Chowdhery et al. 2022 (PaLM, appendix B)
do: forward once, backward twice. What is computed again in the backward is not the model's, so it is in the hardware's
utilisation (HFU) alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from model.configuration import LiquidConfig

# Dense matrix products in 16 bits, TFLOP/s, from the makers' data sheets; the longest name that fits counts.
PEAK_TERAFLOPS = {
    "B200": 2250.0, "H200": 989.4, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.4, "GH200": 989.4,
    "A100": 312.0, "A30": 165.0, "A10G": 70.0, "A10": 125.0, "A40": 149.7, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "V100": 125.0, "T4": 65.0, "RTX 6000 Ada": 364.2, "RTX A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token's forward: the blocks', the embedding's and the head's."""

    blocks: float
    embedding: float
    head: float

    @property
    def training(self) -> float:
        """Forward and backward."""
        return 3 * (self.blocks + self.embedding + self.head)

    def recomputed(self, checkpointing: bool) -> float:
        """What the backward computes again: always the logits (model/loss.py), with checkpointing the blocks, too."""
        return self.head + (self.blocks if checkpointing else 0.0)


def token_flops(config: LiquidConfig, seq_len: int) -> TokenFlops:
    """Count the matrix products of one token in a full row of `seq_len` tokens.

    Attention: over the min(t + 1, W) keys that token t of a row sees; documents in a row are not known here, so for rows
    of many short ones it is an upper limit. The band of the deformable convolution: its R taps. The LSTM runs once in
    `memory_stride` tokens. The table's look-up is no product; the head, tied to it, is.
    """
    width, window = config.hidden_size, min(config.sliding_window, seq_len)
    keys = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len  # seen by a token, on average
    attention = 2 * width * (2 * width + 2 * config.num_key_value_heads * config.head_dim) + 2 * 2 * keys * width
    taps = 2 * config.deformable_groups * config.deformable_taps
    convolution = 2 * width * (3 * width + taps) + 2 * config.deformable_range * width
    experts = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    # The gate is asked twice: by the block, and for its logits (model/moe.py).
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
    """The FLOP/s that a device could have in 16 bits; None for a CPU, an unknown device, and training in fp32."""
    if device.type != "cuda" or not in_16_bits:
        return None
    teraflops = known_teraflops(torch.cuda.get_device_name(device))
    return 1e12 * teraflops if teraflops else None


def known_teraflops(name: str) -> float | None:
    """The peak of the GPU that CUDA calls `name`; None for one that is not known, a part of one (MIG), and a laptop's."""
    if re.search("MIG|Laptop", name):
        return None
    # Whole words: an A1000 is no A100, and a GB200 no B200.
    known = [part for part in PEAK_TERAFLOPS if re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![0-9])", name)]
    return PEAK_TERAFLOPS[max(known, key=len)] if known else None


def utilisation(
    flops: TokenFlops, checkpointing: bool, tokens_per_second: float, world_size: int, peak: float
) -> dict[str, float]:
    """MFU and HFU of a step, by TensorBoard tag; of non-padding tokens; `peak` in FLOP/s of one device."""
    share = tokens_per_second / (world_size * peak)
    return {
        "perf/mfu": share * flops.training,
        "perf/hfu": share * (flops.training + flops.recomputed(checkpointing)),
    }

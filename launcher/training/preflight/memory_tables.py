"""The tables of ds_configs/README.md: the memory that each preset needs under each DeepSpeed JSON.

python -m launcher.training.preflight.memory_tables
"""

from __future__ import annotations

from pathlib import Path

from launcher.training.preflight.memory_estimate import GPUS_PER_NODE, Activations, Sizes, state_bytes
from launcher.training.setup.deepspeed_config import read_json
from model import LiquidConfig
from model.configuration import preset_names

GPUS = (8, 16, 64)
TOKENS = 8192  # in a micro-batch: 4 rows of 2,048
LED_WORDS = 50266
# Bytes per parameter at the start: rank 0 creates all weights of a fresh model at once, in fp32.
START = 4


def preset(name: str) -> LiquidConfig:
    """Return a preset with the vocabulary size of LED's tokenizer."""
    return LiquidConfig.from_preset(name).sized_for(LED_WORDS, pad_token_id=1, bos_token_id=0, eos_token_id=2)


def presets() -> list[str]:
    """Return the names of all presets, the smallest first."""
    return sorted(preset_names(), key=lambda name: Sizes.of(preset(name)).total)


def expert_parallel_size(num_experts: int, gpus: int) -> int:
    """Return the largest size that fits and stays inside a node, where all-to-all is fast."""
    return max(n for n in range(1, min(gpus, GPUS_PER_NODE) + 1) if gpus % n == 0 and num_experts % n == 0)


def states_table(folder: Path) -> str:
    """Return a Markdown table of the model states by preset and JSON: GB per GPU, and GB of host memory."""
    names = ("zero3", "zero3_offload", "zero1_ep")  # zero3_bf16 needs as much as zero3
    lines = [
        "| preset | JSON | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " | host memory of a node | to start |"
    ]
    lines.append("|---|---|" + "---|" * (len(GPUS) + 2))
    for name in presets():
        config = preset(name)
        sizes = Sizes.of(config)
        for file in names:
            deepspeed = read_json(folder / f"{file}.json")
            both = [state_bytes(sizes, deepspeed, n, expert_parallel_size(config.num_experts, n)) for n in GPUS]
            host = " / ".join(f"{host / 1e9:.1f}" for _, host in both) if any(host for _, host in both) else "-"
            cells = " | ".join(f"{gpu / 1e9:.1f}" for gpu, _ in both)
            lines.append(f"| `{name}` | `{file}.json` | {cells} | {host} | {START * sizes.total / 1e9:.1f} |")
    return "\n".join(lines)


def activations_table() -> str:
    """Return a Markdown table of the GB of activations of a micro-batch of `TOKENS`, by preset."""
    lines = ["| preset | activations kept | recomputed |", "|---|---|---|"]
    for name in presets():
        config = preset(name)
        activations = Activations.of(config)
        kept, recomputed = (activations.peak(config, TOKENS, recompute) / 1e9 for recompute in (False, True))
        lines.append(f"| `{name}` | {kept:.1f} | {recomputed:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(states_table(Path("ds_configs")), activations_table(), sep="\n\n")

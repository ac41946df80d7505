"""Estimate the memory that a GPU needs.

`python -m launcher.training.preflight.memory_estimate` prints the tables of ds_configs/README.md. The estimate adds up:

- model states, by DeepSpeed's own estimators, corrected for experts that are distributed over ranks
- what ZeRO-3 gathers, and the buckets of ZeRO-1 and ZeRO-3, up to the limits in the JSON
- activations, measured on a few layers of the model
"""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from launcher.training.setup.deepspeed_config import read_json
from model import LiquidConfig, LiquidForCausalLM
from model.loss import CHUNK_TOKENS
from model.moe import Experts

PRESETS = ("tiny", "base", "1b", "8b-a1b")
GPUS = (8, 16, 64)
GPUS_PER_NODE = 8
TOKENS = 8192  # in a micro-batch: 4 rows of 2,048
LED_WORDS = 50266
COUNTED_TOKENS = 128
HALF = 2  # bytes of an fp16 or bf16 number
# Bytes per parameter at the start: rank 0 creates all weights of a fresh model at once, in fp32.
START = 4


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of the model, of its routed experts, and of the largest tensor outside the experts."""

    total: int
    experts: int
    largest: int
    layers: int

    @classmethod
    def of(cls, config: LiquidConfig) -> Sizes:
        with torch.device("meta"):
            model = LiquidForCausalLM(config)
        experts = sum(
            p.numel() for module in model.modules() if isinstance(module, Experts) for p in module.parameters()
        )
        largest = max(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
        return cls(sum(p.numel() for p in model.parameters()), experts, largest, config.num_hidden_layers)


def preset(name: str) -> LiquidConfig:
    """Return a preset with the vocabulary size of LED's tokenizer."""
    return LiquidConfig.from_preset(name).sized_for(LED_WORDS, pad_token_id=1, bos_token_id=0, eos_token_id=2)


def expert_parallel_size(num_experts: int, gpus: int) -> int:
    """Return the largest size that fits and stays inside a node, where all-to-all is fast."""
    return max(n for n in range(1, min(gpus, GPUS_PER_NODE) + 1) if gpus % n == 0 and num_experts % n == 0)


def state_bytes(sizes: Sizes, deepspeed: dict, gpus: int, expert_parallel: int) -> tuple[int, int]:
    """Return the bytes of parameters, gradients, optimizer and buckets on one GPU, and in one node's host memory."""
    zero = deepspeed["zero_optimization"]
    per_node, nodes = min(gpus, GPUS_PER_NODE), max(1, gpus // GPUS_PER_NODE)
    dense, local_experts = sizes.total - sizes.experts, sizes.experts // expert_parallel
    bucket = HALF * min(zero["reduce_bucket_size"], dense + local_experts)
    if zero["stage"] == 1:
        # Experts are data-parallel over the ranks that hold the same ones. The estimator is that of stage 2; stage 1
        # also keeps the whole 16-bit gradients, which are added below.
        gpu = estimate_zero2_model_states_mem_needs(dense, per_node, nodes, cpu_offload=False)[1]
        gpu += estimate_zero2_model_states_mem_needs(local_experts, gpus // expert_parallel, 1, cpu_offload=False)[1]
        return gpu + HALF * (dense + local_experts) + 2 * bucket, 0
    offload = "offload_optimizer" in zero
    # The tensors of one layer's local experts are gathered together.
    largest = max(sizes.largest, local_experts // sizes.layers)
    host, gpu, _ = estimate_zero3_model_states_mem_needs(
        sizes.total, largest, per_node, nodes, cpu_offload=offload, cpu_offload_params="offload_param" in zero
    )
    # The estimator assumes that one layer is gathered at a time. DeepSpeed also keeps weights that it will use again, up
    # to a limit.
    gathered = HALF * min(zero["stage3_max_live_parameters"], dense + local_experts)
    return gpu + gathered + 2 * bucket, host if offload else 0


@dataclass(frozen=True)
class Activations:
    """Bytes per token that the forward keeps for the backward.

    layer: in each layer. recomputed_layer: in each layer with activation checkpointing. outside: outside the layers.
    """

    layer: float
    recomputed_layer: float
    outside: float

    @classmethod
    def of(cls, config: LiquidConfig) -> Activations:
        """Measure in bf16 on a few layers with a small vocabulary and only the experts that a token uses."""
        fields = config.to_dict()
        fields.update(
            num_hidden_layers=config.memory_every, num_experts=config.num_experts_per_tok, vocab_size=128,
            used_vocab_size=128, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LiquidForCausalLM(LiquidConfig(**fields)).bfloat16().train()
        kept = saved_bytes(model, COUNTED_TOKENS)
        model.activation_checkpointing_enable()
        recomputed = saved_bytes(model, COUNTED_TOKENS)
        inputs = HALF * config.hidden_size
        layer = (kept - recomputed) / COUNTED_TOKENS / config.memory_every + inputs
        return cls(layer, inputs, recomputed / COUNTED_TOKENS - config.memory_every * inputs)

    def saved(self, config: LiquidConfig, tokens: int, recompute: bool) -> float:
        """Return the bytes that the forward of a micro-batch keeps."""
        layer = self.recomputed_layer if recompute else self.layer
        return tokens * (config.num_hidden_layers * layer + self.outside)

    def peak(self, config: LiquidConfig, tokens: int, recompute: bool) -> float:
        """Return the peak bytes, including what the backward adds.

        That is one chunk's logits and their gradient and, with `recompute`, the recomputed activations of one layer.
        """
        logits = 2 * HALF * config.vocab_size * min(tokens, CHUNK_TOKENS)
        return self.saved(config, tokens, recompute) + logits + (tokens * self.layer if recompute else 0)


def saved_bytes(model: LiquidForCausalLM, tokens: int) -> int:
    """Return the bytes that a forward over one row of `tokens` keeps for the backward, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(4, 128, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in saved.values())


def states_table(folder: Path) -> str:
    """Return a Markdown table of the model states by preset and JSON: GB per GPU, and GB of host memory."""
    names = ("zero3", "zero3_offload", "zero1_ep")  # zero3_bf16 needs as much as zero3
    lines = [
        "| preset | JSON | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " | host memory of a node | to start |"
    ]
    lines.append("|---|---|" + "---|" * (len(GPUS) + 2))
    for name in PRESETS:
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
    for name in PRESETS:
        config = preset(name)
        activations = Activations.of(config)
        kept, recomputed = (activations.peak(config, TOKENS, recompute) / 1e9 for recompute in (False, True))
        lines.append(f"| `{name}` | {kept:.1f} | {recomputed:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(states_table(Path("ds_configs")), activations_table(), sep="\n\n")

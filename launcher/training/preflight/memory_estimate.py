"""Estimate the memory that a GPU needs.

The estimate adds up:

- model states, by DeepSpeed's own estimators, corrected for experts that are distributed over ranks
- what ZeRO-3 gathers, and the buckets of ZeRO-1 and ZeRO-3, up to the limits in the JSON
- activations, measured on a few layers of the model
"""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

from dataclasses import dataclass

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from model import LiquidConfig, LiquidForCausalLM
from model.loss import CHUNK_TOKENS
from model.size import count_parameters

GPUS_PER_NODE = 8
COUNTED_TOKENS = 128
HALF = 2  # bytes of an fp16 or bf16 number


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
        count = count_parameters(model)
        largest = max(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
        return cls(count.total, count.routed, largest, config.num_hidden_layers)


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

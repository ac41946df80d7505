"""The models of the quality benchmark (`tiny`, `tiny` without a part, LFM2), and how they are trained and timed."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM, PreTrainedModel
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeExperts, Lfm2MoeSparseMoeBlock

from data_pipeline.loading.loader import BatchStream
from launcher.config import RunConfig
from model import LiquidConfig, LiquidForCausalLM
from model.convolution import DeformableConvolution
from model.documents import Documents
from model.embedding import LiquidEmbedding
from model.loss import LossWeights, RunningMeans, language_loss_sums, total_loss
from model.metrics import count_tokens
from model.moe import Experts, balancing_bias, set_balancing_bias, updated_balancing_bias
from tests.benchmarks.quality_data import VOCAB_SIZE, ValidationBatch

BALANCING_RATE = RunConfig().balancing_rate
LARGEST_DIFFERENCE = 0.03  # of total and of active parameters
SPEED_WARM_UP = 3  # steps that are not counted


class FixedTaps(nn.Module):
    """The gated convolution with fixed delays: each channel learns one weight for each of the K shortest delays."""

    def __init__(self, deformable: DeformableConvolution):
        super().__init__()
        self.in_proj, self.norm, self.out_proj = deformable.in_proj, deformable.norm, deformable.out_proj
        bound = deformable.taps**-0.5  # as nn.Conv1d begins
        self.convolution = nn.Parameter(torch.empty(deformable.taps, self.norm.weight.numel()).uniform_(-bound, bound))

    def forward(self, hidden: torch.Tensor, documents: Documents, *unused, **also_unused) -> torch.Tensor:
        signal, gate = self.in_proj(hidden).chunk(2, dim=-1)
        mixed = depthwise_convolution(signal, self.convolution, documents)
        return self.out_proj(self.norm(mixed) * F.silu(gate))


class UncompressedEmbedding(nn.Module):
    """Only the embedding's gated convolution: it drops no component, so there is nothing to reconstruct."""

    def __init__(self, liquid: LiquidEmbedding):
        super().__init__()
        self.gate, self.convolution = liquid.gate, liquid.convolution
        self.config = liquid.config

    def forward(self, embedded: torch.Tensor, documents: Documents, *unused, **also_unused) -> tuple[torch.Tensor, ...]:
        embedded = F.rms_norm(embedded, embedded.shape[-1:], eps=self.config.rms_norm_eps)
        mixed = F.silu(self.gate(embedded)) * depthwise_convolution(embedded, self.convolution, documents)
        error = torch.zeros(embedded.shape[:2], device=embedded.device)
        on_target = torch.full_like(error, self.config.embedding_target_ratio)  # the budget term is then zero
        return embedded + mixed, error, on_target


class NoExpert(nn.Module):
    """An expert that adds nothing."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_zeros(())


def depthwise_convolution(signal: torch.Tensor, taps: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Convolve each channel causally, within documents: `[B, T, D]`, `[K, D]` → `[B, T, D]`."""
    total = signal * taps[0]
    for delay in range(1, len(taps)):
        earlier = F.pad(signal[:, :-delay], (0, 0, delay, 0))
        total = total + torch.where((documents.offset >= delay).unsqueeze(-1), earlier, 0.0) * taps[delay]
    return total


def fix_taps(model: LiquidForCausalLM) -> None:
    for layer in model.model.layers:
        layer.convolution = FixedTaps(layer.convolution)


def remove_compression(model: LiquidForCausalLM) -> None:
    model.model.liquid_embedding = UncompressedEmbedding(model.model.liquid_embedding)


def remove_shared_experts(model: LiquidForCausalLM) -> None:
    for layer in model.model.layers:
        layer.moe.shared_experts = NoExpert()


@dataclass(frozen=True)
class LiquidVariant:
    """`tiny` with other sizes, with parts replaced, or with another loss."""

    sizes: dict[str, float] = field(default_factory=dict)
    surgery: Callable[[LiquidForCausalLM], None] | None = None
    loss_weights: LossWeights = field(default_factory=LossWeights)

    def build(self, vocab_size: int) -> LiquidForCausalLM:
        model = LiquidForCausalLM(LiquidConfig.from_preset("tiny").sized_for(vocab_size, **self.sizes))
        if self.surgery is not None:
            self.surgery(model)
        return model


@dataclass(frozen=True)
class Lfm2Variant:
    """LFM2's mixture of experts of `tiny`'s width, with about its total and active parameters."""

    layers: str  # `c`, a short convolution, or `a`, full attention
    dense_intermediate_size: int  # of the first two layers, as in LFM2
    moe_intermediate_size: int

    def build(self, vocab_size: int) -> Lfm2MoeForCausalLM:
        tiny = LiquidConfig.from_preset("tiny")
        shared = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
                  "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
        config = Lfm2MoeConfig(
            **{name: getattr(tiny, name) for name in shared},
            vocab_size=vocab_size,
            num_hidden_layers=len(self.layers),
            layer_types=[{"c": "conv", "a": "full_attention"}[kind] for kind in self.layers],
            num_dense_layers=2,
            intermediate_size=self.dense_intermediate_size,
            moe_intermediate_size=self.moe_intermediate_size,
            # LFM2's default of a million is for texts of 128,000 tokens.
            rope_parameters={"rope_type": "default", "rope_theta": tiny.rope_theta},
            # As in `tiny`'s layers. With LFM2's default of 0.02 it is 0.16 bits per byte worse after 250,000 tokens.
            initializer_range=tiny.hidden_size**-0.5,
        )
        return Lfm2MoeForCausalLM(config)


ABLATIONS = {
    "no-delays": LiquidVariant(surgery=fix_taps),
    "no-memory": LiquidVariant({"memory_every": 1000}),
    "memory-stride-1": LiquidVariant({"memory_stride": 1}),
    "memory-stride-8": LiquidVariant({"memory_stride": 8}),
    "memory-stride-32": LiquidVariant({"memory_stride": 32}),
    "memory-every-2nd-layer": LiquidVariant({"memory_every": 2}),
    "no-compression": LiquidVariant(surgery=remove_compression),
    # Only the mask is removed; the rotations stay.
    "all-components": LiquidVariant({"embedding_minimum_ratio": 0.98, "embedding_target_ratio": 0.99}),
    "no-shared-expert": LiquidVariant(surgery=remove_shared_experts),
    "no-focal-no-reconstruction": LiquidVariant(loss_weights=LossWeights(focal=0.0, reconstruction=0.0)),
}
VARIANTS = {
    "tiny": LiquidVariant(),
    # The proportions of LFM2-8B-A1B; and fewer, wider layers, which are faster.
    "lfm2moe": Lfm2Variant("ccaccacc", 608, 128),
    "lfm2moe-6-layers": Lfm2Variant("ccacca", 864, 192),
    **ABLATIONS,
}


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return `total`, and `active`: all but the routed experts that a token did not choose."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = (module for module in model.modules() if isinstance(module, Experts | Lfm2MoeExperts))
    routed = sum(parameter.numel() for module in experts for parameter in module.parameters())
    unused = 1 - model.config.num_experts_per_tok / model.config.num_experts
    return {"total": total, "active": round(total - routed * unused)}


def check_sizes() -> None:
    """Raise `ValueError` if the compared models no longer have the same size."""
    with torch.device("meta"):
        counts = {
            name: count_parameters(VARIANTS[name].build(VOCAB_SIZE)) for name in VARIANTS.keys() - ABLATIONS.keys()
        }
    for name, count in counts.items():
        for kind, number in count.items():
            if abs(number / counts["tiny"][kind] - 1) > LARGEST_DIFFERENCE:
                raise ValueError(
                    f"{name} has {number:,} {kind} parameters and tiny {counts['tiny'][kind]:,}, which is more than "
                    f"{LARGEST_DIFFERENCE:.0%} apart: adapt its sizes in VARIANTS"
                )


class LiquidObjective:
    """The project's own loss, with running means and balancing bias updated as in a step of train.py."""

    def __init__(self, model: LiquidForCausalLM, weights: LossWeights):
        sizes = model.config
        self.model, self.weights = model, weights
        self.means = RunningMeans.initial(sizes.num_hidden_layers, sizes.num_experts, sizes.embedding_target_ratio)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = self.model(**batch, running_means=self.means)
        counts = count_tokens(batch, self.model.config.pad_token_id)
        self.statistics, self.tokens = output.statistics, counts["tokens"]
        return total_loss(output.loss_sums, self.weights, counts["supervised"], counts["tokens"])

    def step_ended(self) -> None:
        self.means = self.means.updated(
            (self.statistics["routing"] / self.tokens).float(),
            (self.statistics["retained_ratio"] / self.tokens).float(),
        )
        bias = updated_balancing_bias(balancing_bias(self.model), self.statistics["load"], BALANCING_RATE)
        set_balancing_bias(self.model, bias)


class Lfm2Objective:
    """The cross entropy, and updates of the experts' bias, which transformers leaves to the training program."""

    def __init__(self, model: Lfm2MoeForCausalLM):
        self.model = model
        self.blocks = [module for module in model.modules() if isinstance(module, Lfm2MoeSparseMoeBlock)]
        self.chosen: dict[nn.Module, torch.Tensor] = {}
        for block in self.blocks:
            block.gate.register_forward_hook(self._remember_choice)

    def _remember_choice(self, gate: nn.Module, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        self.chosen[gate] = output[2]

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        counts = count_tokens(batch, self.model.config.pad_token_id)
        self.text = (batch["input_ids"] != self.model.config.pad_token_id).flatten()
        return cross_entropy_sum(self.model, batch) / counts["supervised"]

    @torch.no_grad()
    def step_ended(self) -> None:
        for block in self.blocks:
            load = self.chosen[block.gate][self.text].flatten().bincount(minlength=len(block.expert_bias)).float()
            block.expert_bias.copy_(updated_balancing_bias(block.expert_bias, load, BALANCING_RATE))


def cross_entropy_sum(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return nats over all targets of a batch, with the same code for every model."""
    # From the position ids, transformers' masks also know where a document begins.
    hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    used = getattr(model.config, "used_vocab_size", model.config.vocab_size)
    focal_gamma = LossWeights().focal_gamma  # for the focal sum, which is not used
    sums = language_loss_sums(hidden, batch["labels"], lambda states: model.lm_head(states)[..., :used], focal_gamma)
    return sums["cross_entropy"]


class MasterWeights:
    """AdamW on fp32 copies of weights that compute in another type; buffers keep their type."""

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype):
        self.working = list(parameters)
        self.master = [parameter.detach().float().clone() for parameter in self.working]
        for parameter in self.working:
            parameter.data = parameter.data.to(dtype)
        self.optimizer = torch.optim.AdamW(self.master, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take the weights' gradients, clip their norm to 1, and write the updated weights back."""
        for master, working in zip(self.master, self.working, strict=True):
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        for master, working in zip(self.master, self.working, strict=True):
            working.copy_(master)


class Trainee:
    """One variant with its objective and optimizer."""

    def __init__(self, name: str, vocab_size: int, seed: int, dtype: torch.dtype = torch.bfloat16):
        variant = VARIANTS[name]
        torch.manual_seed(seed)
        self.model = variant.build(vocab_size).train()
        if isinstance(variant, LiquidVariant):
            self.objective = LiquidObjective(self.model, variant.loss_weights)
        else:
            self.objective = Lfm2Objective(self.model)
        self.weights = MasterWeights(self.model.parameters(), dtype)

    def train_step(self, batch: dict[str, torch.Tensor], learning_rate: float) -> float:
        """Take one step on one batch; return the loss."""
        loss = self.objective.loss(batch)
        loss.backward()
        self.weights.step(learning_rate)
        self.objective.step_ended()
        return loss.item()

    @torch.no_grad()
    def bits_per_byte(self, batches: Sequence[ValidationBatch]) -> float:
        """Return the plain cross entropy in bits per byte of text; special tokens cost bits but have no bytes."""
        self.model.eval()
        nats = sum(cross_entropy_sum(self.model, batch.rows).item() for batch in batches)
        self.model.train()
        return nats / math.log(2) / sum(batch.text_bytes for batch in batches)


def measure_speed(stream: BatchStream, steps: int) -> dict:
    """Measure the step times of `tiny` and each other model in bf16, and of `tiny` and LFM2 in fp32 as well."""
    result = {"load_before": os.getloadavg()[0], "threads": torch.get_num_threads()}
    batches = [stream.next_step()[0] for _ in range(8)]
    others = [name for name in VARIANTS if name != "tiny"]
    for dtype, names in (("bfloat16", others), ("float32", others[:2])):
        tiny = Trainee("tiny", stream.data.vocab_size, 0, getattr(torch, dtype))
        result[dtype] = {}
        for name in names:
            other = Trainee(name, stream.data.vocab_size, 0, getattr(torch, dtype))
            result[dtype][name] = timing = step_times(tiny, other, batches, steps)
            print(f"speed: {name}, {dtype}: {timing['ratio']:.3f} of tiny's step time", flush=True)
    return result


def step_times(first: Trainee, second: Trainee, batches: list[dict[str, torch.Tensor]], steps: int) -> dict[str, float]:
    """Return median step seconds of two models that take turns, and the median ratio of a turn, second over first."""
    # One thread never waits for another, so its CPU time is right even on a busy machine.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(SPEED_WARM_UP + steps):
        for trainee, seconds in zip((first, second), times, strict=True):
            begun = clock()
            trainee.train_step(batches[step % len(batches)], 1e-3)
            seconds.append(clock() - begun)
    first_seconds, second_seconds = (seconds[SPEED_WARM_UP:] for seconds in times)
    ratios = [mine / other for other, mine in zip(first_seconds, second_seconds, strict=True)]
    lower, ratio, upper = statistics.quantiles(ratios, n=4)
    return {
        "tiny_seconds": statistics.median(first_seconds),
        "seconds": statistics.median(second_seconds),
        "ratio": ratio,
        # For a median of normal values, from the quartiles: a few steps that something else slowed down count little.
        "ratio_standard_error": 0.93 * (upper - lower) / math.sqrt(steps),
    }

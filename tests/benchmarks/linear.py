"""What one layer and one training step cost on a CPU as texts grow; by hand: `python -m tests.benchmarks.linear`.

Memory is what torch allocates, which is exact and the same in every run; the profiler prints a line on stderr. Time is the
CPU time of one thread, because several threads spin while they wait for one another, which would count. The process keeps
the memory it frees, as training does: otherwise zeroing new pages makes the longest text a fifth slower.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from model import LiquidConfig, LiquidForCausalLM, LiquidModel
from model.loss import LossWeights
from tests.benchmarks.measurement import Goal, Options, Row
from tests.benchmarks.registry import AS_IN_TRAINING

LENGTHS = (1024, 2048, 4096, 8192, 16384)
HIDDEN, HEADS, KEY_VALUE_HEADS = 256, 4, 1
LED_VOCABULARY = 50_266
STEP_TOKENS = 8192
MEGABYTE = 2**20
ENVIRONMENT = AS_IN_TRAINING


def liquid_layer() -> LiquidModel:
    """Return `base` at half its width with a single layer that has every branch; its inputs are embeddings."""
    torch.manual_seed(0)
    config = LiquidConfig(
        vocab_size=128, hidden_size=HIDDEN, num_hidden_layers=1, max_position_embeddings=max(LENGTHS),
        num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS, sliding_window=512, deformable_groups=4,
        moe_intermediate_size=512, shared_expert_intermediate_size=256, memory_hidden_size=128, memory_every=1,
        embedding_components=HIDDEN,
    )  # fmt: skip
    return LiquidModel(config).train()


class FullAttention(nn.Module):
    """Attention that local attention replaces: `[B, T, D]` → `[B, T, D]`; each token attends to all before it."""

    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, HIDDEN * (HEADS + 2 * KEY_VALUE_HEADS) // HEADS, bias=False)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(hidden).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2)
        query, key, value = heads.split((HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS), dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def forward_and_backward(module: nn.Module, tokens: int) -> None:
    """Run a layer over a text of `tokens` tokens, with gradients for its input and its parameters."""
    hidden = torch.full((1, tokens, HIDDEN), 0.02).normal_().requires_grad_()
    output = module(inputs_embeds=hidden)[0] if isinstance(module, LiquidModel) else module(hidden)
    output.square().sum().backward()


def training_step(model: LiquidForCausalLM, ids: torch.Tensor, plain: bool) -> dict[str, torch.Tensor]:
    """Run forward and backward of the cross entropy on a model without gradients; return the gradients by name.

    `plain` keeps the logits of all tokens in fp32 and passes them to `F.cross_entropy`, as textbooks do.
    """
    model.loss_weights = LossWeights(focal=0.0, reconstruction=0.0, budget=0.0, expert_usage=0.0, z_loss=0.0)
    if plain:
        hidden = model.model(ids).last_hidden_state[0, :-1]
        loss = F.cross_entropy(model.lm_head(hidden)[:, : model.config.used_vocab_size].float(), ids[0, 1:])
    else:
        loss = model(ids, labels=ids).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def tiny_model(tokens: int, recompute: bool) -> LiquidForCausalLM:
    """Return the preset `tiny` with LED's vocabulary, in training mode."""
    torch.manual_seed(0)
    config = LiquidConfig.from_preset("tiny", max_position_embeddings=tokens).sized_for(LED_VOCABULARY)
    model = LiquidForCausalLM(config).train()
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def cpu_seconds(step: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of several steps, since other processes can only add to it."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    return min(times)


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the peak of the memory that a step allocates, beyond what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def measure_growth(options: Options) -> list[Row]:
    """Measure microseconds per token of the liquid layer on long texts and on short ones; a slope of 1 is linear."""
    short, *longer = (256, 1024) if options.quick else (1024, 4096, 16384)
    rows = []
    for long in longer:
        turns = growth_turns(short, long, options.repeats(3))
        per_token = [[1e6 * seconds / long for seconds in figures] for figures in zip(*turns, strict=True)]
        what, peer = (
            f"layer of half `base`'s width, forward and backward, {long:,} tokens",
            f"slope 1: {short:,} tokens",
        )
        rows.append(Row(what, "µs/token", per_token[1], peer, per_token[0], Goal(at_most=1.1)))
    return rows


def measure_loss_memory(options: Options) -> list[Row]:
    """Measure the peak megabytes of a training step with the loss in chunks, beside plain cross entropy of all logits."""
    tokens = STEP_TOKENS // 8 if options.quick else STEP_TOKENS
    chunked, plain = (peak / MEGABYTE for peak in loss_peaks(tokens, recompute=True))
    what = f"training step of `tiny`, {tokens:,} tokens, {LED_VOCABULARY:,} words"
    return [Row(what, "MB, peak", [chunked], "`F.cross_entropy` of all logits", [plain])]


def growth_turns(short: int, long: int, repeats: int) -> list[tuple[float, float]]:
    """Return CPU seconds for `long` tokens in the liquid layer: cut into short texts, and as one long text.

    The two are measured one right after the other, so that a machine that slows down for a while slows down both.
    """
    layer = liquid_layer()
    forward_and_backward(layer, long)  # allocates memory, gradients and libraries' buffers
    turns = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(long // short):
            forward_and_backward(layer, short)
        middle = time.process_time()
        forward_and_backward(layer, long)
        turns.append((middle - begin, time.process_time() - middle))
    return turns


def time_growth(short: int, long: int, repeats: int) -> float:
    """Return the CPU time of a long text divided by that of a short one; the least of several ratios."""
    return min(long // short * as_one / in_parts for in_parts, as_one in growth_turns(short, long, repeats))


def layer_table() -> str:
    """Return seconds and megabytes of both layers at every length, and the ratio of the longest to the shortest."""
    rows = ["tokens | liquid layer s | MB | full attention s | MB"]
    layers = liquid_layer(), FullAttention()
    for layer in layers:
        forward_and_backward(layer, LENGTHS[-1])  # allocates memory, gradients and libraries' buffers
    costs = []
    for tokens in LENGTHS:
        steps = [partial(forward_and_backward, layer, tokens) for layer in layers]
        repeats = 5 if tokens <= 4096 else 3
        costs.append([cost for step in steps for cost in (cpu_seconds(step, repeats), peak_bytes(step) / MEGABYTE)])
        rows.append("{:>6,} | {:>14.2f} | {:>6,.0f} | {:>16.2f} | {:>6,.0f}".format(tokens, *costs[-1]))
    growth = [last / first for first, last in zip(costs[0], costs[-1], strict=True)]
    rows.append("growth | {:>13.1f}x | {:>5.1f}x | {:>15.1f}x | {:>5.1f}x".format(*growth))
    return "\n".join(rows)


def loss_peaks(tokens: int, recompute: bool) -> tuple[int, int]:
    """Return the peak bytes of a training step with the loss in chunks, and with all logits in fp32."""
    ids = torch.randint(4, LED_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    steps = [partial(training_step, tiny_model(tokens, recompute), ids, plain) for plain in (False, True)]
    return peak_bytes(steps[0]), peak_bytes(steps[1])


def loss_table() -> str:
    """Return the peak memory of a training step with the loss in chunks and with all logits, and the ratio."""
    rows = [f"a step of tiny, {STEP_TOKENS:,} tokens, {LED_VOCABULARY:,} words | chunked MB | plain MB | ratio"]
    for recompute in (True, False):
        chunked, plain = loss_peaks(STEP_TOKENS, recompute)
        name = "recomputing activations" if recompute else "keeping activations"
        rows.append(f"{name:>42} | {chunked / MEGABYTE:>10,.0f} | {plain / MEGABYTE:>8,.0f} | {plain / chunked:.1f}x")
    return "\n".join(rows)


if __name__ == "__main__":
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})
    print(layer_table())
    print()
    print(loss_table())

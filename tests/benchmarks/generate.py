"""Decoding speed at growing positions, by hand: `python -m tests.benchmarks.generate [--threads 1] [--profile]`.

Compare the preset `tiny` with transformers' `Lfm2Moe` and a Llama with full attention, all of one size (that of the quality
benchmark), with random weights in fp32. The models take turns, step by step, so that a busy machine is busy for all of
them. The median step counts. `tiny` reads its whole past. The time of the others depends only on the shape of their caches,
so the keys and values of the first 1,024 tokens are repeated up to the position.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from model import LiquidConfig, LiquidForCausalLM
from tests.benchmarks.measurement import Options, Row, rates, seconds_of, take_turns
from tests.benchmarks.quality_models import VARIANTS, count_parameters

POSITIONS = (1024, 4096, 16384, 32768)
BATCHES = (1, 8)
VOCAB_SIZE = 8192
READ = 1024  # tokens at a time
REPEATS = 40


def build_models(names: Sequence[str] = ("tiny", "Lfm2Moe", "Llama")) -> dict[str, PreTrainedModel]:
    """Build the named models, each with about 4.25M active parameters."""
    torch.manual_seed(0)
    longest = max(POSITIONS) + READ
    liquid = LiquidConfig.from_preset("tiny").sized_for(VOCAB_SIZE, max_position_embeddings=longest)
    llama = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=longest, tie_word_embeddings=True,
    )  # fmt: skip
    lfm2 = VARIANTS["lfm2moe"].build(VOCAB_SIZE)
    lfm2.config.max_position_embeddings = longest
    built = {"tiny": LiquidForCausalLM(liquid), "Lfm2Moe": lfm2, "Llama": LlamaForCausalLM(llama)}
    return {name: built[name].eval() for name in names}


def filled_cache(model: PreTrainedModel, position: int, batch: int) -> Cache:
    """Return a cache as it is after `position` tokens in each of `batch` rows."""
    ids = torch.randint(4, VOCAB_SIZE, (batch, READ), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    for _ in range(position // READ if isinstance(model, LiquidForCausalLM) else 1):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if not isinstance(model, LiquidForCausalLM):
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None and layer.keys.numel():
                layer.keys, layer.values = (x.repeat(1, 1, position // READ, 1) for x in (layer.keys, layer.values))
    assert cache.get_seq_length() == position
    return cache


def decoder(model: PreTrainedModel, position: int, batch: int) -> Callable[[], None]:
    """Return a greedy decoder at `position`; each call generates one token in every row."""
    cache = filled_cache(model, position, batch)
    ids = torch.full((batch, 1), 7)

    def step() -> None:
        nonlocal ids
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)

    return step


def measure(options: Options) -> list[Row]:
    """Measure tokens per second of `tiny` beside `Lfm2Moe` at two positions; the models take turns step by step."""
    models = build_models(("tiny", "Lfm2Moe"))
    rows = []
    with torch.inference_mode():
        for batch, position in ((1, READ),) if options.quick else ((1, READ), (8, 4 * READ)):
            seconds = step_seconds(models, position, batch, options.repeats(REPEATS))
            ours, theirs = (rates(batch, seconds[name]) for name in models)
            what = f"decoding with `tiny`, {batch} row{'s' * (batch > 1)}, position {position:,}"
            rows.append(Row(what, "tokens/s", ours, "`Lfm2Moe`, 8 layers", theirs))
    return rows


def step_seconds(models: dict[str, PreTrainedModel], position: int, batch: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each model's steps; the models take turns."""
    steps = {name: partial(seconds_of, decoder(model, position, batch)) for name, model in models.items()}
    take_turns(steps, 3)  # not counted
    return take_turns(steps, repeats)


def table(repeats: int) -> str:
    """Return tokens per second of every model at every position, and the ratios of `tiny`'s speed to the others'."""
    models = build_models()
    sizes = {name: count_parameters(model) for name, model in models.items() if name != "Llama"}
    sizes["Llama"] = dict.fromkeys(("total", "active"), sum(weight.numel() for weight in models["Llama"].parameters()))
    rows = [f"{name}: {size['total']:,} parameters, {size['active']:,} active" for name, size in sizes.items()]
    rows += [
        "",
        "| rows | position | tiny | Lfm2Moe | Llama | over Lfm2Moe | over Llama |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch in BATCHES:
        for position in POSITIONS:
            seconds = step_seconds(models, position, batch, repeats)
            speed = {name: batch / statistics.median(steps) for name, steps in seconds.items()}
            figures = [f"{speed[name]:,.0f}" for name in models]
            ratios = [f"{speed['tiny'] / speed[name]:.2f}×" for name in ("Lfm2Moe", "Llama")]
            rows.append(f"| {batch} | {position:,} | " + " | ".join(figures + ratios) + " |")
            print(rows[-1], flush=True)
    return "\n".join(rows)


def profile_step(batch: int) -> str:
    """Return the time of a decoding step of `tiny` by operator."""
    step = decoder(build_models()["tiny"], POSITIONS[0], batch)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(20):
            step()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--profile", action="store_true", help="show the time of a step by operator instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        print(f"load {os.getloadavg()[0]:.1f}, {options.threads} thread(s), torch {torch.__version__}")
        print(profile_step(batch=1) if options.profile else table(options.repeats))

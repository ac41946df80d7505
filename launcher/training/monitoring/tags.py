"""All TensorBoard tags of a run, each with the meaning of its figure.

    python -m launcher.training.monitoring.tags

prints the table of README.md beside this file. A name in braces stands for the part that differs: `tag.format(term="focal")`
fills it in, and `pattern(tag)` finds such tags again.
"""

from __future__ import annotations

import re

MEANINGS: dict[str, str] = {}


def _tag(name: str, meaning: str) -> str:
    MEANINGS[name] = meaning
    return name


# at every step
LOSS = _tag("train/loss", "the loss that training minimises: the weighted sum of its terms")
LOSS_TERM = _tag("train/{term}", "one term of the loss, a mean over tokens, without its weight (`model/loss.py`)")
PERPLEXITY = _tag("train/perplexity", "exp of the cross entropy")
LEARNING_RATE = _tag("train/learning_rate", "learning rate of the step")
GRADIENT_NORM = _tag("train/grad_norm", "norm of all gradients before clipping; infinite if fp16 overflowed")
LOSS_SCALE = _tag("train/loss_scale", "fp16's loss scale; in fp16 only")
SKIPPED_STEPS = _tag("train/skipped_steps", "steps so far whose update was skipped because they were not finite")
SPIKE = _tag("train/spike", "1 if the loss spiked in this step, else 0")
BAD_SHARD_ROWS = _tag("data/bad_shard_rows", "rows of the batch that belong to bad shards and were left out")
RETAINED_RATIO = _tag("model/retained_ratio", "mean share of the embedding's components that a token keeps")
LOAD_MAX_OVER_MEAN = _tag(
    "moe/layer_{layer:02d}/load_max_over_mean", "tokens of the layer's busiest expert over the mean of its experts"
)
ROUTER_ENTROPY = _tag("moe/layer_{layer:02d}/router_entropy", "mean entropy of the layer's router, in nats")
BIAS_MAX = _tag("balance/bias_max", "largest router bias that balances the experts")
TOKENS_PER_SECOND = _tag("perf/tokens_per_second", "tokens without padding, over all ranks")
STEP_SECONDS = _tag("perf/step_seconds", "duration of the step")
DATA_SECONDS = _tag("perf/data_seconds", "how long the step waited for its batch")
PART_SECONDS = _tag("perf/{part}_seconds", "duration of `forward`, `backward` and `optimizer`")
MEMORY = _tag("perf/memory_gigabytes", "peak memory of rank 0 so far: tensors on a GPU, else the process")
MFU = _tag("perf/mfu", "model FLOPs over the devices' peak; if the peak is known (`monitor.peak_teraflops`)")
HFU = _tag("perf/hfu", "the same with recomputed activations")

# at every `monitor.every`-th step
GROUP_NORM = _tag("grad_norm/{group}", "norm of the gradients of a group of layers, before clipping")
ACTIVATIONS = _tag(
    "activations/{layer}/{statistic}", "`mean`, `rms`, `max_abs` and the shares `nonfinite`, `saturated`"
)
GRADIENTS = _tag("gradients/{layer}/{statistic}", "the same of the gradients of these activations")
LOAD = _tag("moe/load", "picture of the tokens that each expert of each layer got")

# at saves and validations
SAVE_SECONDS = _tag("perf/save_seconds", "how long training waited for a save")
VALIDATION_SECONDS = _tag("perf/validation_seconds", "duration of a validation")
VALIDATION = "validation/"  # begins the tags of all that a validation measures
HELD_OUT_CROSS_ENTROPY = _tag(
    "validation/cross_entropy", "mean over the supervised tokens of all held-out rows, in nats"
)
HELD_OUT_PERPLEXITY = _tag("validation/perplexity", "exp of that")
TOKEN_ACCURACY = _tag("validation/token_accuracy", "share of these tokens that are the likeliest")
TOP5_ACCURACY = _tag("validation/top5_accuracy", "share of these tokens that are among the five likeliest")
SEQUENCE_ACCURACY = _tag(
    "validation/sequence_accuracy", "share of the whole answers whose tokens are all the likeliest"
)
SOURCE_CROSS_ENTROPY = _tag(
    "validation/by_source/{source}", "cross entropy of the tokens from one source; the eight largest"
)
SOURCES = _tag("validation/by_source", "text: the cross entropy and the tokens of all sources")
ANSWERS = _tag("validation/answers", "text: the model's answers to a few held-out questions")

# at each start
RUN_FILE = _tag("run/run.yaml", "text: the run's `run.yaml`")
LOAD_LEGEND = _tag("moe/load/legend", "text: the colours of `moe/load`")

CROSS_ENTROPY = LOSS_TERM.format(term="cross_entropy")
PLACEHOLDER = re.compile(r"\{(\w+)[^}]*\}")


def pattern(tag: str) -> re.Pattern[str]:
    """Return a pattern for all tags of this kind, with a named group for each part that differs."""
    fixed, text = 0, ""
    for placeholder in PLACEHOLDER.finditer(tag):
        text += f"{re.escape(tag[fixed : placeholder.start()])}(?P<{placeholder[1]}>.+)"
        fixed = placeholder.end()
    return re.compile(text + re.escape(tag[fixed:]))


def table() -> str:
    """Return the Markdown table of all tags."""
    rows = [f"| `{_without_format(tag)}` | {meaning} |" for tag, meaning in MEANINGS.items()]
    return "\n".join(["| tag | meaning |", "|---|---|", *rows]) + "\n"


def _without_format(tag: str) -> str:
    """Return the tag with `{layer}` for `{layer:02d}`."""
    return PLACEHOLDER.sub(r"{\1}", tag)


if __name__ == "__main__":
    print(table(), end="")

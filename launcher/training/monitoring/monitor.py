"""Rank 0's output about a run: TensorBoard figures and console lines."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.config import RunConfig
from launcher.training.monitoring import tags
from launcher.training.monitoring.answers import SampledAnswer, answers_as_text
from launcher.training.monitoring.console import RunConsole
from launcher.training.monitoring.event_writer import EventWriter
from launcher.training.monitoring.expert_load import LEGEND, load_image
from launcher.training.monitoring.hyperparameters import write_hyperparameters
from launcher.training.monitoring.layer_watch import LayerWatch
from launcher.training.monitoring.profiler import StepProfiler
from launcher.training.monitoring.step_timer import StepTimer
from launcher.training.monitoring.throughput import peak_flops, token_flops, utilisation
from launcher.training.monitoring.validation import ValidationResult
from model.loss import PER_SUPERVISED_TOKEN, PER_TOKEN, weight_of
from model.metrics import load_max_over_mean

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Number of sources, the largest first, whose validation losses are drawn as curves. A table lists all sources.
SOURCES = 8
RUN_FILE = "run.yaml"  # next to the TensorBoard folder (launcher/run_folder.py)


class Monitor:
    """Show a run's figures on rank 0. On other ranks (`active=False`) it only takes part in the collectives."""

    def __init__(self, folder: Path, first_step: int, config: RunConfig, active: bool):
        self.active = active
        self.config = config
        self.folder = folder
        self.profiler: StepProfiler | None = None
        self.started = time.perf_counter()
        if not active:
            return
        self.console = RunConsole(first_step, config.max_steps)
        # The second argument hides the points written after the checkpoint that this run resumes from.
        self.writer = EventWriter(folder, first_step, self.say)
        self.run_file = _as_code((folder.parent / RUN_FILE).read_text())
        self._describe(first_step)
        if config.profile.steps is not None:
            self.profiler = StepProfiler(folder.parent / "profile", config.profile.steps)

    def watch(self, engine: DeepSpeedEngine, seq_len: int) -> None:
        """Start to measure the engine's layers and to time its steps; called by all ranks.

        seq_len: tokens in a row, for counting FLOPs.
        Raises `ConfigurationError` if a pattern in `monitor.layers` matches no layer.
        """
        self.device = engine.device
        self.timer = StepTimer(engine.device)
        self.layers = LayerWatch(engine, self.config.monitor)
        self.flops = token_flops(engine.module.config, seq_len)
        given = self.config.monitor.peak_teraflops
        self.peak = (
            1e12 * given if given else peak_flops(engine.device, engine.fp16_enabled() or engine.bfloat16_enabled())
        )

    def step_begins(self, step: int) -> None:
        self.layers.step_begins(step)
        if self.profiler is not None:
            self.profiler.step_begins(step)
        self.started = time.perf_counter()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to `tags.PART_SECONDS`."""
        # Ranks that don't display timings must not collect them, or CUDA events pile up.
        with self.timer.timed(part) if self.active else nullcontext():
            yield

    def backward_ended(self) -> None:
        """Measure the gradients if this step is a measured one; called by all ranks after each backward."""
        self.layers.backward_ended()

    def step_ended(
        self, step: int, totals: dict[str, torch.Tensor], supervised: float, tokens: float, values: dict[str, float]
    ) -> None:
        """Record one step.

        totals: loss and routing sums over all ranks. supervised, tokens: numbers of tokens to divide them by.
        values: other figures by TensorBoard tag.
        """
        if not self.active:
            return
        seconds = time.perf_counter() - self.started
        values = {**self._losses(totals, supervised, tokens), **values}
        values[tags.RETAINED_RATIO] = totals["retained_ratio"].item() / tokens
        values[tags.TOKENS_PER_SECOND] = tokens / seconds
        values[tags.STEP_SECONDS] = seconds
        values |= {tags.PART_SECONDS.format(part=part): spent for part, spent in self.timer.take().items()}
        values[tags.MEMORY] = memory_used(self.device) / 1e9
        if self.peak is not None:
            recomputes = self.config.activation_checkpointing
            values |= utilisation(self.flops, recomputes, tokens / seconds, dist.get_world_size(), self.peak)
        values[tags.PERPLEXITY] = math.exp(min(values[tags.CROSS_ENTROPY], 700.0))
        for layer, imbalance in enumerate(load_max_over_mean(totals["load"]).tolist()):
            values[tags.LOAD_MAX_OVER_MEAN.format(layer=layer)] = imbalance
        for layer, entropy in enumerate((totals["router_entropy"] / tokens).tolist()):
            values[tags.ROUTER_ENTROPY.format(layer=layer)] = entropy
        for tag, value in (values | self.layers.values).items():
            self.writer.add_scalar(tag, value, step)
        if self.layers.looks_at(step):
            self.writer.add_image(tags.LOAD, load_image(totals["load"]), step)
        self.console.step(step, values)
        for warning in self.layers.warnings:
            self.say(f"step {step}: {warning}")
        if self.profiler is not None and (trace := self.profiler.step_ended(step)):
            self.say(f"profile written to {trace}")

    def validated(
        self, step: int, result: ValidationResult, is_best: bool, answers: list[SampledAnswer], seconds: float
    ) -> None:
        """Show a validation's results, its duration, and the model's answers to a few held-out questions."""
        if not self.active:
            return
        self.writer.add_scalar(tags.VALIDATION_SECONDS, seconds, step)
        shares = {tags.TOKEN_ACCURACY: result.token_accuracy, tags.TOP5_ACCURACY: result.top5_accuracy}
        if result.sequence_accuracy is not None:
            shares[tags.SEQUENCE_ACCURACY] = result.sequence_accuracy
        values = {
            tags.HELD_OUT_CROSS_ENTROPY: result.cross_entropy,
            tags.HELD_OUT_PERPLEXITY: result.perplexity,
            **shares,
        }
        for source, (loss, _) in list(result.by_source.items())[:SOURCES]:
            values[tags.SOURCE_CROSS_ENTROPY.format(source=source)] = loss
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        rows = [f"| {name} | {loss:.4f} | {tokens:,} |" for name, (loss, tokens) in result.by_source.items()]
        table = "\n".join(["| source | cross entropy | tokens |", "|---|---|---|", *rows])
        self.writer.add_text(tags.SOURCES, table, step)
        if answers:
            self.writer.add_text(tags.ANSWERS, answers_as_text(answers), step)
        said = "  ".join(
            f"{tag.removeprefix(tags.VALIDATION).replace('_', ' ')} {share:.1%}" for tag, share in shares.items()
        )
        best = "  (the best so far)" if is_best else ""
        self.say(
            f"validation at step {step}: cross entropy {result.cross_entropy:.4f}  perplexity {result.perplexity:.2f}  "
            f"{said}{best}"
        )

    def say(self, message: str) -> None:
        """Print a line, on rank 0."""
        if self.active:
            self.console.say(message)

    def goes_back_to(self, step: int) -> None:
        """Hide the points after `step` in TensorBoard, because training repeats those steps."""
        if self.active:
            self.writer.forget_after(step)
            self.console.goes_on_from(step)
            if step < self.described_at:
                self._describe(step + 1)

    def saved(self, step: int, seconds: float | None) -> None:
        """Record how long training waited for a save (None if nothing was saved), and flush all points so far."""
        if self.active and seconds is not None:
            self.writer.add_scalar(tags.SAVE_SECONDS, seconds, step)
        self.flush()

    def flush(self) -> None:
        """Write all points so far to disk, for readers and for a run that resumes from a checkpoint made now."""
        if self.active:
            self.writer.flush()

    def close(self) -> None:
        if self.active:
            self.writer.close()

    def _describe(self, step: int) -> None:
        """Write the run's constant texts at `step`; `goes_back_to` writes them again if it hides that step."""
        self.described_at = step
        self.writer.add_text(tags.RUN_FILE, self.run_file, step)
        self.writer.add_text(tags.LOAD_LEGEND, LEGEND, step)
        write_hyperparameters(self.writer, self.config, step)

    def _losses(self, totals: dict[str, torch.Tensor], supervised: float, tokens: float) -> dict[str, float]:
        """Return each loss term as the mean that training minimises, and their weighted sum."""
        terms = {term: totals[term].item() / supervised for term in PER_SUPERVISED_TOKEN}
        terms |= {term: totals[term].item() / tokens for term in PER_TOKEN}
        loss = sum(weight_of(term, self.config.loss) * value for term, value in terms.items())
        return {tags.LOSS: loss, **{tags.LOSS_TERM.format(term=term): value for term, value in terms.items()}}


def memory_used(device: torch.device) -> float:
    """Return the peak memory so far in bytes: of tensors on CUDA, otherwise of this process's RAM."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _as_code(text: str) -> str:
    """Format text as a Markdown code block for TensorBoard."""
    return "\n".join(f"    {line}" for line in text.splitlines())

"""What a person sees of a run: TensorBoard, a progress bar, and lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from launcher.config import RunConfig
from model.loss import PER_SUPERVISED_TOKEN, PER_TOKEN
from model.metrics import load_max_over_mean

LINES = 50  # a run without a terminal prints about this many


class Monitor:
    """Rank 0's view of the run; the other ranks make one with `active=False` that does nothing."""

    def __init__(self, folder: Path, first_step: int, config: RunConfig, active: bool):
        self.active = active
        self.config = config
        self.every = max(1, config.max_steps // LINES)
        self.started = time.perf_counter()
        if not active:
            return
        # purge_step hides the points that a run wrote after the checkpoint it resumes from: one point a step.
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=config.max_steps, initial=first_step - 1, unit="step", dynamic_ncols=True, disable=not terminal
        )

    def step_begins(self) -> None:
        self.started = time.perf_counter()

    def step_ended(
        self, step: int, totals: dict[str, torch.Tensor], supervised: float, tokens: float, values: dict[str, float]
    ) -> None:
        """Record one step: its loss and routing sums over all ranks and what they are divided by, and other values."""
        if not self.active:
            return
        seconds = time.perf_counter() - self.started
        values = {**self._losses(totals, supervised, tokens), **values}
        values["model/retained_ratio"] = totals["retained_ratio"].item() / tokens
        values["perf/tokens_per_second"] = tokens / seconds
        values["perf/step_seconds"] = seconds
        for layer, imbalance in enumerate(load_max_over_mean(totals["load"]).tolist()):
            values[f"moe/layer_{layer:02d}/load_max_over_mean"] = imbalance
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self._show(step, values)

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self.active:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def flush(self) -> None:
        """Let a reader, or a run that goes on from a checkpoint made now, find all points so far."""
        if self.active:
            self.writer.flush()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.writer.close()

    def _losses(self, totals: dict[str, torch.Tensor], supervised: float, tokens: float) -> dict[str, float]:
        """Each loss term as the mean that training minimises, and their weighted sum."""
        terms = {term: totals[term].item() / supervised for term in PER_SUPERVISED_TOKEN}
        terms |= {term: totals[term].item() / tokens for term in PER_TOKEN}
        loss = sum(self.config.loss.of(term) * value for term, value in terms.items())
        return {"train/loss": loss, **{f"train/{term}": value for term, value in terms.items()}}

    def _show(self, step: int, values: dict[str, float]) -> None:
        summary = (
            f"loss {values['train/loss']:.3f}  cross entropy {values['train/cross_entropy']:.3f}  "
            f"{values['perf/tokens_per_second']:,.0f} tokens/s"
        )
        self.bar.set_postfix_str(summary, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (step % self.every == 0 or step in (1, self.config.max_steps)):
            rate = values["train/learning_rate"]
            print(f"step {step}/{self.config.max_steps}  {summary}  lr {rate:.2e}", flush=True)

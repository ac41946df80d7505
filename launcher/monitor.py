"""What a person sees of a run: TensorBoard, a progress bar, and lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.loss import PER_SUPERVISED_TOKEN, PER_TOKEN
from model.metrics import load_max_over_mean

LINES = 50  # a run without a terminal prints about this many


class Monitor:
    """Rank 0's view of the run; the other ranks make one with `active=False` that does nothing."""

    def __init__(self, folder: Path, first_step: int, max_steps: int, active: bool):
        self.active = active
        self.max_steps = max_steps
        self.every = max(1, max_steps // LINES)
        self.started = time.perf_counter()
        if not active:
            return
        # purge_step hides the points that a run wrote after the checkpoint it resumes from: one point a step.
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        self.bar = tqdm(
            total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def step_begins(self) -> None:
        self.started = time.perf_counter()

    def step_ended(self, step: int, values: dict[str, float], load: torch.Tensor, tokens: int) -> None:
        """Record one step: `values` by TensorBoard tag, the experts' load `[L, E]`, the step's non-padding tokens."""
        if not self.active:
            return
        seconds = time.perf_counter() - self.started
        values["perf/tokens_per_second"] = tokens / seconds
        values["perf/step_seconds"] = seconds
        for layer, imbalance in enumerate(load_max_over_mean(load).tolist()):
            values[f"moe/layer_{layer:02d}/load_max_over_mean"] = imbalance
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        summary = (
            f"loss {values['train/loss']:.3f}  cross entropy {values['train/cross_entropy']:.3f}  "
            f"{values['perf/tokens_per_second']:,.0f} tokens/s"
        )
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(summary, refresh=False)
        if self.bar.disable and (step % self.every == 0 or step in (1, self.max_steps)):
            print(f"step {step}/{self.max_steps}  {summary}  lr {values['train/learning_rate']:.2e}", flush=True)

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self.active:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.writer.close()


def loss_values(sums: dict[str, float], supervised: float, tokens: float) -> dict[str, float]:
    """Each loss term as the mean that training minimises, by TensorBoard tag."""
    values = {f"train/{term}": sums[term] / supervised for term in PER_SUPERVISED_TOKEN}
    return values | {f"train/{term}": sums[term] / tokens for term in PER_TOKEN}

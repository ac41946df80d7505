"""Rank 0's console output: a line for each step on a terminal, otherwise for every few steps."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.text import Text

from launcher.training.monitoring import tags

LINES = 50  # step lines of a whole run without a terminal, roughly
BAR = 12  # width of the progress bar in characters


class RunConsole:
    """Print rank 0's lines on stdout.

    The remaining time is estimated from the steps of this process, including waits for checkpoints.
    """

    def __init__(self, first_step: int, max_steps: int):
        self.max_steps = max_steps
        self.every = max(1, max_steps // LINES)
        self.console = Console(file=sys.stdout, highlight=False)
        # Open MPI gives its ranks a pseudo-terminal even if its output goes to a file.
        self.is_terminal = self.console.is_terminal and "OMPI_COMM_WORLD_SIZE" not in os.environ
        self.goes_on_from(first_step - 1)

    def goes_on_from(self, step: int) -> None:
        """Restart the time estimate: training starts after `step`, or has gone back to it."""
        self.last, self.begun = step, time.perf_counter()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Print a step's line; without a terminal only for the first, the last and some steps between.

        values: by TensorBoard tag.
        """
        taken = max(1, step - self.last)
        left = (time.perf_counter() - self.begun) / taken * (self.max_steps - step)
        eta = f"ETA {_clock(left)}"
        loss, cross_entropy = values[tags.LOSS], values[tags.CROSS_ENTROPY]
        losses = f"loss {loss:.3f}  cross entropy {cross_entropy:.3f}"
        speed = f"{values[tags.TOKENS_PER_SECOND]:,.0f} tokens/s"
        rate = f"lr {values[tags.LEARNING_RATE]:.2e}"
        if not self.is_terminal:
            if step % self.every == 0 or step in (1, self.max_steps):
                print(f"step {step}/{self.max_steps}  {losses}  {speed}  {rate}  {eta}", flush=True)
            return
        width = len(str(self.max_steps))
        full = round(BAR * step / self.max_steps)
        line = Text.assemble(
            (f"step {step:>{width}}/{self.max_steps} ", "bold"), ("━" * full, "green"), ("─" * (BAR - full), "dim"),
            f" {step / self.max_steps:>4.0%}  ", (eta, "cyan"), "  ", (losses, "bold" if _is_finite(loss) else "bold red"),
            f"  {speed}  {rate}",
        )  # fmt: skip
        # A narrow window cuts off the end of the line, so the most important values come first.
        self.console.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    def say(self, message: str) -> None:
        """Print a message unchanged."""
        print(message, flush=True)


def _clock(seconds: float) -> str:
    """Format seconds as 02:05, 1:02:05 or 3 days, 1:02:05."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:")


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")

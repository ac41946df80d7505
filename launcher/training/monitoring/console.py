"""What a run prints: on a terminal one line for each step, elsewhere one for every few."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.text import Text

LINES = 50  # a run without a terminal prints about this many
BAR = 12  # characters


class RunConsole:
    """Rank 0's lines on stdout; the time left is what the steps of this process took, waits for saves included."""

    def __init__(self, first_step: int, max_steps: int):
        self.max_steps = max_steps
        self.every = max(1, max_steps // LINES)
        self.console = Console(file=sys.stdout, highlight=False)
        # Open MPI gives its ranks a terminal of their own, wherever its output goes.
        self.is_terminal = self.console.is_terminal and "OMPI_COMM_WORLD_SIZE" not in os.environ
        self.goes_on_from(first_step - 1)

    def goes_on_from(self, step: int) -> None:
        """The time left is counted from here: a run begins after `step`, or goes back to it."""
        self.last, self.begun = step, time.perf_counter()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a step, by TensorBoard tag; all of them on a terminal, else the first, the last and some between."""
        taken = max(1, step - self.last)
        left = (time.perf_counter() - self.begun) / taken * (self.max_steps - step)
        eta = f"ETA {_clock(left)}"
        loss, cross_entropy = values["train/loss"], values["train/cross_entropy"]
        losses = f"loss {loss:.3f}  cross entropy {cross_entropy:.3f}"
        speed = f"{values['perf/tokens_per_second']:,.0f} tokens/s"
        rate = f"lr {values['train/learning_rate']:.2e}"
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
        # A narrow window cuts the end off: what matters most stands first.
        self.console.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    def say(self, message: str) -> None:
        """Print a sentence as it is."""
        print(message, flush=True)


def _clock(seconds: float) -> str:
    """Seconds as 02:05 or 1:02:05 or 3 days, 1:02:05."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:")


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")

"""What a run prints, on a real terminal and without one."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest

# With this clock every step takes a second, however busy the machine is.
LINES = """
import itertools
from types import SimpleNamespace
import launcher.training.monitoring.console
from launcher.training.monitoring.console import RunConsole
launcher.training.monitoring.console.time = SimpleNamespace(perf_counter=itertools.count().__next__)
console = RunConsole(first_step=1, max_steps=200)
for step in range(1, 201):
    loss = float("nan") if step == 7 else 3.5 - step / 100
    console.step(step, {"train/loss": loss, "train/cross_entropy": 3.25, "train/learning_rate": 1e-3,
                        "perf/tokens_per_second": 1234.5})
console.say("layer [bold]one[/bold] is said as it is, " + "however long " * 12)
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_a_terminal(command: list[str], columns: int, timeout: int = 60) -> str:
    """Run a command on a terminal of its own, and return its output with control sequences; it must succeed."""
    master, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env={**environment, "TERM": "xterm-256color"})
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # raised on Linux once the other side is closed
            break
        if not part:
            break
        written += part
    os.close(master)
    assert process.wait(timeout) == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("columns", [60, 160])
def test_a_terminal_gets_one_line_for_each_step_that_fits_its_width(columns):
    written = on_a_terminal([sys.executable, "-c", LINES], columns)
    assert "\x1b[" in written  # in colours
    lines = CONTROL.sub("", written).replace("\r", "").splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [int(re.match(r"step +(\d+)/200 ", line)[1]) for line in steps] == list(range(1, 201))
    assert max(map(len, steps)) <= columns
    left = [divmod(seconds, 60) for seconds in reversed(range(200))]
    assert [re.search(r"ETA (\S+)  loss ", line)[1] for line in steps] == [f"{m:02}:{s:02}" for m, s in left]
    assert "━━━━━━──────  50%" in steps[99] and "loss 2.500" in steps[99]
    assert "loss nan" in steps[6]
    assert "[bold]one[/bold]" in CONTROL.sub("", written)
    if columns == 160:
        assert all("1,234 tokens/s  lr 1.00e-03" in line for line in steps)


def test_without_a_terminal_every_few_steps_print_a_line_of_plain_text():
    written = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, check=True).stdout
    steps = [line for line in written.splitlines() if line.startswith("step ")]
    assert len(steps) == 51 and steps[0].startswith("step 1/200  loss 3.490  cross entropy 3.250")
    assert steps[-1].startswith("step 200/200  ") and steps[-1].endswith("ETA 00:00")
    assert "\x1b" not in written and "━" not in written
    assert sum("however long" in line for line in written.splitlines()) == 1


@pytest.mark.slow
def test_training_on_a_terminal_shows_each_step_and_its_sentences(trainer):
    command = [sys.executable, "train.py", *trainer.arguments("terminal", "max_steps=3")]
    lines = CONTROL.sub("", on_a_terminal(command, 100, timeout=240)).replace("\r", "").splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line[:8] for line in steps] == ["step 1/3", "step 2/3", "step 3/3"]
    assert not any("Setting accelerator" in line for line in lines)  # DeepSpeed prints it if none is set
    assert "100%  ETA 00:00  loss " in steps[2]
    assert any(line.startswith("done at step 3: run ") for line in lines)

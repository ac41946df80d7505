"""What a start costs before the work begins: `lfm --help`, `lfm prepare`, and training up to its first step.

    python -m tests.benchmarks start-up

Each command runs in a new process and takes turns with its peer. A first run is not counted, so files are in the page
cache.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.measurement import Goal, Options, Row, seconds_of, take_turns

PROJECT = Path(__file__).parents[2]
LFM = [sys.executable, "-m", "launcher.cli"]
IMPORTS = "import torch, deepspeed, transformers"
# Any PyTorch program's first optimizer step imports torch._dynamo, and any model of transformers its parallel layers.
FIRST_UPDATE = f"""{IMPORTS}
from transformers import PreTrainedModel
parameter = torch.nn.Parameter(torch.zeros(1))
parameter.grad = torch.zeros(1)
torch.optim.AdamW([parameter], fused=True).step()
"""
HELP_REPEATS, PREPARE_REPEATS, TRAINING_REPEATS = 7, 3, 5


def measure(options: Options) -> list[Row]:
    """Measure the seconds of each start by the clock, beside its limit."""
    folder = options.scratch / "start-up"
    folder.mkdir()
    return [measure_help(options), measure_prepare(options, folder), *measure_first_step(options, folder)]


def measure_help(options: Options) -> Row:
    """Compare `lfm --help` with a bare interpreter."""
    seconds = _by_turns({"help": [*LFM, "--help"], "python": _python("pass")}, options.repeats(HELP_REPEATS))
    return Row("`lfm --help`", "s", seconds["help"], "`python -c pass`", seconds["python"])


def measure_prepare(options: Options, folder: Path) -> Row:
    """Compare the whole command with the sum of its own stages in the same run, in one process, so that none waits."""
    from tests.benchmarks.corpus import open_corpus

    corpus = open_corpus(options)
    source, answer = folder / "rows.parquet", folder / "stages.json"
    corpus.rows.write_parquet(source, row_group_size=4000)
    arguments = ["prepare", str(source), "--out", str(folder / "shards"), "--tokenizer", str(corpus.tokenizer)]
    wall, stages = [], []
    for _ in range(1 + options.repeats(PREPARE_REPEATS)):
        wall.append(_run(_this_module("prepare", answer, *arguments, "--workers", "1")))
        stages.append(json.loads(answer.read_text()))
        shutil.rmtree(folder / "shards")
    what = f"`lfm prepare --workers 1`, {corpus.megabytes:.0f} MB of text"
    return Row(what, "s", wall[1:], "its own stages", stages[1:], Goal(at_most=1.5, of_difference=True))


def measure_first_step(options: Options, folder: Path) -> list[Row]:
    """Compare training `tiny` up to its first step with bare imports, and with what any training program needs."""
    data, answer, run = folder / "sample", folder / "first-step.json", folder / "run"
    subprocess.run([*LFM, "prepare", "sample", "--out", str(data)], cwd=PROJECT, check=True)
    training = _this_module(
        "first-step", answer, "--deepspeed_config", str(PROJECT / "ds_configs/zero3.json"),
        f"data={data}", f"output={run}", "max_steps=1", "validate_every=0",
    )  # fmt: skip

    def start() -> float:
        begun = time.time()
        _run(training)
        shutil.rmtree(run)
        return float(answer.read_text()) - begun

    limits = {f"`{IMPORTS}`": IMPORTS, "the same, a transformers model's base and one AdamW step": FIRST_UPDATE}
    ways = {"start": start, **{name: functools.partial(_run, _python(code)) for name, code in limits.items()}}
    take_turns(ways, 1)
    seconds = take_turns(ways, options.repeats(TRAINING_REPEATS))
    what = "`train.py` with `tiny`, up to its first step"
    return [Row(what, "s", seconds["start"], name, seconds[name], Goal(at_most=1.5)) for name in limits]


def _by_turns(commands: dict[str, list[str]], repeats: int) -> dict[str, list[float]]:
    ways = {name: functools.partial(_run, command) for name, command in commands.items()}
    take_turns(ways, 1)
    return take_turns(ways, repeats)


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _this_module(what: str, answer: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.startup", what, str(answer), *arguments]


def _run(command: list[str]) -> float:
    """Run a command in the project's folder and return its seconds."""
    return seconds_of(lambda: subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL, check=True))


def prepare_and_tell_stages(answer: Path, arguments: list[str]) -> int:
    """Run `lfm` in this process, and write the sum of the stages' seconds to a file."""
    from data_pipeline.preparation import prepare as module
    from data_pipeline.preparation.job import Seconds

    seconds = Seconds()
    module.prepare = functools.partial(module.prepare, seconds=seconds)
    from launcher.cli import main  # only now, because it may import the patched function by name

    code = main(arguments)
    answer.write_text(json.dumps(seconds.total()))
    return code


def train_and_tell_first_step(answer: Path, arguments: list[str]) -> None:
    """Run `train.py` in this process, write the time at which the first step begins to a file, and exit there."""
    import train

    def first_step(*_) -> None:
        answer.write_text(json.dumps(time.time()))
        os._exit(0)

    train.train_step = first_step
    train.main(arguments)


if __name__ == "__main__":
    what, answer, *arguments = sys.argv[1:]
    if what == "prepare":
        sys.exit(prepare_and_tell_stages(Path(answer), arguments))
    train_and_tell_first_step(Path(answer), arguments)

"""Train runs one after another on two forked ranks; at a chosen moment, rank 1 gets a signal or loses its data.

Arguments (JSON): a list of {arguments, fault, step, shard}, and a file for the exit codes and output of each run.
"""

import json
import os
import signal
import sys
from pathlib import Path

from forked_ranks import RANKS, train_forked

import launcher.training.checkpoints.saver as saver
import train

build_engine, train_step, write_file = train.build_engine, train.train_step, saver.FileWriter.save
VICTIM = 1


class Moment:
    """Call `happen` once, when rank 1 is in the given part of a step."""

    def __init__(self, part: str, step: int, happen) -> None:
        self.part, self.step, self.happen = part, step, happen
        self.now, self.happened = 0, False

    def reached(self, part: str) -> None:
        if part == self.part and self.now == self.step and not self.happened:
            self.happened = True
            self.happen()

    def watch(self) -> None:
        train.build_engine, train.train_step = self.build, self.take_step
        moment = self

        def save(writer, *arguments):
            moment.reached("save")
            write_file(writer, *arguments)

        saver.FileWriter.save = save

    def build(self, model, resolved):
        layer = model.model.layers[-1]
        layer.register_forward_pre_hook(lambda *_: self.reached("forward" if layer.training else "validation"))
        layer.convolution_norm.register_forward_hook(self.watch_backward)
        engine = build_engine(model, resolved)
        engine.optimizer.optimizer.register_step_pre_hook(lambda *_: self.reached("optimizer"))
        return engine

    def watch_backward(self, module, arguments, output) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self.reached("backward"))

    def take_step(self, engine, batches, state, *others) -> None:
        self.now = state.step + 1
        self.reached("begin")
        train_step(engine, batches, state, *others)


def lose(kind: str, shard: str) -> None:
    """Delete the file of a shard, or truncate it to half; a copy is kept as `SHARD.away`."""
    if kind == "delete":
        os.rename(shard, f"{shard}.away")
    else:
        content = Path(shard).read_bytes()
        Path(f"{shard}.away").write_bytes(content)
        os.truncate(shard, len(content) // 2)


def main() -> None:
    runs, report = json.loads(sys.argv[1])
    results = []
    for number, run in enumerate(runs):
        fault = run.get("fault")
        outputs = [Path(f"{report}-{number}-{rank}.txt") for rank in range(RANKS)]

        def before(rank: int, run=run, fault=fault) -> None:
            if rank != VICTIM or not fault:
                return
            if fault in ("delete", "cut"):
                Moment("begin", run["step"], lambda: lose(fault, run["shard"])).watch()
            else:
                Moment(fault, run["step"], lambda: os.kill(os.getpid(), signal.SIGTERM)).watch()

        codes, _ = train_forked(run["arguments"], outputs, before)
        if fault in ("delete", "cut"):
            os.replace(f"{run['shard']}.away", run["shard"])
        results.append({"codes": codes, "printed": [output.read_text() for output in outputs]})
        Path(report).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

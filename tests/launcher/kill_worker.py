"""Train one run that is killed repeatedly, and start it again each time until it is done.

Arguments (JSON): the run's arguments, the number of kills, a seed, and a file for the record of each start. The run's two
ranks are forked from this process.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from forked_ranks import RANKS, train_forked

import launcher.training.checkpoints.saver as saver
import train
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import find_checkpoint

# What the rank is doing when it is killed, and how many seconds after its beginning the kill comes at most. The kinds take
# turns; ranks and times are random.
KINDS = {"steps": 1.0, "save": 0.15, "hashing": 0.01, "steps ": 1.0, "publishing": 0.02, "start": 3.0}


def kill_when_begun(kind: str, seconds: float, skip: int, record: Path) -> None:
    """Make this process kill itself `seconds` after it has begun something of a kind for the `skip`th time."""
    main_thread, left = threading.main_thread().ident, [skip]

    def kill() -> None:
        time.sleep(seconds)
        frames, frame = [], sys._current_frames().get(main_thread)
        step = None
        while frame is not None:
            frames.append(frame.f_code.co_name)
            if frame.f_code is train.main.__code__ and "state" in frame.f_locals:
                step = frame.f_locals["state"].step
            frame = frame.f_back
        record.write_text(json.dumps({"step": step, "in": frames[:3]}))
        os.kill(os.getpid(), signal.SIGKILL)

    def begun() -> None:
        left[0] -= 1
        if left[0] == 0:
            threading.Thread(target=kill, daemon=True).start()

    def watched(function, counts=lambda *_: True):
        def call(*arguments, **options):
            if counts(*arguments):
                begun()
            return function(*arguments, **options)

        return call

    if kind == "start":
        left[0] = 1
        begun()
    elif kind == "save":
        saver.CheckpointSaver.save = watched(saver.CheckpointSaver.save)
    elif kind == "hashing":
        saver._describe_written = watched(saver._describe_written)
    elif kind == "publishing":
        settle = saver.CheckpointSaver.settle
        saver.CheckpointSaver.settle = watched(settle, lambda self, *_: self._pending is not None)
    else:
        train.train_step = watched(train.train_step)


def main() -> int:
    arguments, kills, seed, report = json.loads(sys.argv[1])
    chosen, happened = random.Random(seed), []
    folder = Path(next(a for a in arguments if a.startswith("output=")).removeprefix("output="))
    outputs = [folder.with_name(f"{folder.name}-rank-{rank}.txt") for rank in range(RANKS)]
    record = folder.with_name(f"{folder.name}-killed.json")
    while True:
        kind = list(KINDS)[len(happened) % len(KINDS)] if len(happened) < kills else None
        victim = chosen.randrange(RANKS)
        seconds = chosen.uniform(0, KINDS.get(kind, 0))
        skip = chosen.randint(1, 3) if kind and kind.strip() == "steps" else chosen.randint(1, 2)

        def before(rank: int, kind=kind, victim=victim, seconds=seconds, skip=skip) -> None:
            if kind and rank == victim:
                kill_when_begun(kind, seconds, skip, record)

        codes, ended_after = train_forked(arguments, outputs, before, launched=kind == "start")
        printed = outputs[0].read_text().splitlines()
        announced = [line.split()[1] for line in printed if "is saved; training waited" in line]
        found, passed_over = find_checkpoint(RunFolder(folder), "auto")
        happened.append({
            "kind": kind and kind.strip(), "rank": victim, "codes": codes, "ended_after": ended_after,
            "announced": announced, "newest": found and found.name, "passed_over": passed_over,
            "said": printed[-1:], **(json.loads(record.read_text()) if kind and record.exists() else {}),
        })  # fmt: skip
        record.unlink(missing_ok=True)
        Path(report).write_text(json.dumps(happened, indent=1))
        if codes[victim] == 0:
            return 0
        if codes[victim] != -signal.SIGKILL:
            print(*(output.read_text() for output in outputs))
            return 1


if __name__ == "__main__":
    sys.exit(main())

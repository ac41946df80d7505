"""How fast a checkpoint is saved and restored, beside a plain copy of its files that is synced to the disk.

    python -m tests.benchmarks checkpoint

A save ends when the checkpoint is published: written, hashed, synced and renamed. A restore begins with the search for the
newest complete checkpoint, which hashes all of its files, and ends when it is loaded. Files are in the page cache.
"""

from __future__ import annotations

import launcher.training.accelerator  # noqa: F401 - DeepSpeed reads what it sets

import os
import shutil
from pathlib import Path

from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState, find_checkpoint
from launcher.training.checkpoints.restore import load_checkpoint
from launcher.training.checkpoints.saver import CheckpointSaver
from tests.benchmarks.measurement import Options, Row, rates, seconds_of, take_turns
from tests.benchmarks.training_step import Loop, build_training

LED_VOCABULARY = 50_266
REPEATS = 5


def measure(options: Options) -> list[Row]:
    """Measure megabytes per second of the checkpoint's files."""
    vocabulary = 2048 if options.quick else LED_VOCABULARY
    engine, batch, _ = build_training(Loop("deepspeed", "tiny", layers=4, vocabulary=vocabulary, rows=1, seq_len=256))
    engine.backward(engine(**batch).loss)
    engine.step()  # the optimizer now has state to save

    run, copied = RunFolder(options.scratch / "checkpoint" / "run"), options.scratch / "checkpoint" / "copy"
    run.claim()
    state = TrainState.initial(engine.module)
    saver = CheckpointSaver(engine, run, "made up", keep=1, say=print)

    def save() -> float:
        state.step += 1
        return seconds_of(lambda: (saver.save(state), saver.settle()))

    def copy() -> float:
        shutil.rmtree(copied, ignore_errors=True)
        newest, _ = find_checkpoint(run, "auto")
        return seconds_of(lambda: copy_durably(newest, copied))

    def restore() -> float:
        return seconds_of(lambda: load_checkpoint(engine, find_checkpoint(run, "auto")[0]))

    seconds = take_turns({"save": save, "copy": copy, "restore": restore}, 1 + options.repeats(REPEATS))
    megabytes = sum(path.stat().st_size for path in find_checkpoint(run, "auto")[0].iterdir()) / 1e6
    speeds = {name: rates(megabytes, values[1:]) for name, values in seconds.items()}
    peer = "file copy, synced"
    return [
        Row(f"checkpoint of {megabytes:.0f} MB saved", "MB/s", speeds["save"], peer, speeds["copy"]),
        Row(f"checkpoint of {megabytes:.0f} MB restored", "MB/s", speeds["restore"], peer, speeds["copy"]),
    ]


def copy_durably(source: Path, target: Path) -> None:
    """Copy the files of a folder, and wait until the disk has them."""
    target.mkdir(parents=True)
    for path in [Path(shutil.copyfile(path, target / path.name)) for path in source.iterdir()] + [target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

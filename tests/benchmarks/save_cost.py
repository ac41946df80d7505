"""What a checkpoint costs the training loop: steps right after a save beside steps without one, in one run.

    python -m tests.benchmarks.save_cost [--saves 6] [--config run.yaml] [--deepspeed_config JSON] [key=value ...]

A save stops the loop while DeepSpeed writes, and slows the steps after it while files are hashed and synced. Of the steps
between two saves, the first half contains the save and the second half does not: the difference of their seconds is the
cost. It is measured by the clock, and in processor time of all threads, which other programs on the machine change less.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import train
from launcher.config_file import DEFAULT_CONFIG, load_run_config

PROJECT = Path(__file__).parents[2]
HALF = 15  # steps, long enough that the files are on the disk before they end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--config", default=str(DEFAULT_CONFIG))
    parser.add_argument("--deepspeed_config", default=str(PROJECT / "ds_configs/zero3.json"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    clocks = {"by the clock": time.perf_counter, "of processor time": time.process_time}
    began: dict[int, dict[str, float]] = {}
    train_step = train.train_step

    def timed(engine, batches, state, *others):
        began[state.step + 1] = {name: clock() for name, clock in clocks.items()}
        train_step(engine, batches, state, *others)

    train.train_step = timed
    last = 2 * HALF * (options.saves + 1)
    with tempfile.TemporaryDirectory() as folder:
        own = [f"max_steps={last}", f"checkpoint_every={2 * HALF}", "validate_every=0", f"output={folder}/run"]
        arguments = ["--deepspeed_config", options.deepspeed_config, "--config", options.config]
        train.main([*arguments, f"data={folder}/data", "prepare.source=sample", *options.overrides, *own])
        newest = Path(folder, "run", "checkpoints", f"step-{last:08d}")
        megabytes = sum(path.stat().st_size for path in newest.iterdir()) / 1e6
    every = load_run_config(options.config, []).checkpoint_every
    print(f"{megabytes:.1f} MB, {options.saves} saves; the default cadence is one in {every} steps")
    for name in clocks:
        report(name, [began[step][name] for step in range(2 * HALF, last + 1)], every)


def report(name: str, began: list[float], every: int) -> None:
    """Print what a save costs; began: the time at which each step begins; the first one has a save at its end."""
    differences, steps = [], []
    for saved in range(0, len(began) - 2 * HALF, 2 * HALF):  # from the beginning of that step
        with_save = began[saved + HALF] - began[saved]
        without = began[saved + 2 * HALF] - began[saved + HALF]
        differences.append(with_save - without)
        steps.append(without / HALF)
    step, cost = statistics.median(steps), statistics.median(differences)
    print(
        f"{name}: a step {step:.3f} s, a save {cost:.3f} s ({min(differences):.3f} to {max(differences):.3f}), "
        f"{cost / step:.2f} steps: {cost / (every * step):.2%} of the loop"
    )


if __name__ == "__main__":
    main()

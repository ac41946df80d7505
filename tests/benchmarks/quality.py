"""How well does the `tiny` preset learn beside LFM2, at the same size and data, and what does each part add?

    python -m tests.benchmarks.quality --data FOLDER [--out FOLDER] [--only sweep|seeds|ablations|speed]

`tiny` and transformers' Lfm2Moe (the same width, total and active parameters) train on the same packed rows in the same
order, in bf16 with fp32 master weights, and are measured in bits per byte of held-out text (the lower the better).

  speed      whole training steps of two models by turns in one process: `tiny` beside every other model, on all cores.
             Let nothing else run meanwhile; or, on a busy machine, take CPU time on one core: --workers 1 --threads 1
  sweep      a short run for each of four learning rates, the same for both models
  seeds      three initialisations of both at their best rate; if LFM2 is faster, it also trains for tiny's time
  ablations  `tiny` without a part, or with another memory, at `tiny`'s best rate

A part runs what it needs of the parts before it. Every run is a process that writes a JSON file to OUT/runs. So after an
interruption the same command does only the missing runs, and if none is missing it prints the tables at once. The files do
not depend on the model's code: after changing the model, use --fresh (with --only, it discards only that part).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from launcher.config import RunConfig
from launcher.errors import one_sentence_errors
from launcher.training.setup.schedule import learning_rate
from tests.benchmarks.quality_data import (
    CURVE_BATCHES,
    TOKENS_PER_STEP,
    prepare_corpus,
    training_stream,
    validation_batches,
)
from tests.benchmarks.quality_models import ABLATIONS, Trainee, check_sizes, count_parameters, measure_speed

PARTS = ("speed", "sweep", "seeds", "ablations")
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)
ABLATION_SEEDS = SEEDS[:2]  # one is not enough: initialisations differ by more than most parts do
CURVE_POINTS = 10


@dataclass(frozen=True)
class Run:
    """Everything that determines one training run."""

    variant: str
    learning_rate: float
    seed: int
    tokens: int
    curve: bool = True

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / TOKENS_PER_STEP))

    @property
    def name(self) -> str:
        return f"{self.variant}-lr{self.learning_rate:g}-seed{self.seed}-{self.steps * TOKENS_PER_STEP}"


def train(run: Run, corpus: Path) -> dict:
    """Train and measure one model; return the content of its JSON file."""
    memory_before = process_memory("VmRSS")
    validation, stream = validation_batches(corpus), training_stream(corpus)
    trainee = Trainee(run.variant, stream.data.vocab_size, run.seed)
    schedule = RunConfig(
        max_steps=run.steps, learning_rate=run.learning_rate, warmup_steps=max(1, round(0.05 * run.steps))
    )
    curve, seconds = [], 0.0
    for step in range(1, run.steps + 1):
        begun = time.perf_counter()
        (batch,) = stream.next_step()
        loss = trainee.train_step(batch, learning_rate(schedule, step - 1))
        seconds += time.perf_counter() - begun
        tokens = step * TOKENS_PER_STEP
        if step * CURVE_POINTS // run.steps > (step - 1) * CURVE_POINTS // run.steps:
            print(f"{run.name}: step {step}/{run.steps}, loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s", flush=True)
            if run.curve:
                bits = trainee.bits_per_byte(validation[:CURVE_BATCHES])
                curve.append({"tokens": tokens, "seconds": seconds, "bits_per_byte": bits})
    return {
        **asdict(run),
        "trained_tokens": tokens,
        "bits_per_byte": trainee.bits_per_byte(validation),
        "curve": curve,
        "seconds": seconds,
        "parameters": count_parameters(trainee.model),
        "peak_memory_megabytes": (process_memory("VmHWM") - memory_before) / 1024,
    }


def process_memory(field: str) -> int:
    """Return this process's `VmRSS`, or its peak `VmHWM`, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Benchmark:
    """The requested parts, the finished runs, and the processes of the missing ones."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.runs = options.out / "runs"
        self.corpus = options.out / "corpus"
        self.threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.workers)
        self.to_discard = {options.only} if options.only else set(PARTS)
        if not options.fresh:
            self.to_discard = set()
        self.discarded: set[str] = set()  # and done again since

    def speed(self) -> dict:
        task = {"speed_steps": self.options.speed_steps}
        return self.results("speed", {"speed": task}, workers=1, threads=self.threads * self.options.workers)["speed"]

    def sweep(self) -> dict[str, list[dict]]:
        """Return the runs of each of the two models, by learning rate."""
        models = ("tiny", "lfm2moe")
        runs = [Run(model, rate, SEEDS[0], self.options.sweep_tokens, False) for model in models for rate in RATES]
        results = self.train_all("sweep", runs)
        return {model: [result for result in results if result["variant"] == model] for model in models}

    def best_rates(self) -> dict[str, float]:
        if self.options.learning_rate:
            return dict.fromkeys(("tiny", "lfm2moe"), self.options.learning_rate)
        return {model: best_rate(results) for model, results in self.sweep().items()}

    def seeds(self) -> dict[str, list[dict]]:
        """Return the runs of each row of the first table."""
        rates, tokens = self.best_rates(), self.options.tokens
        rows = {
            "tiny": [Run("tiny", rates["tiny"], seed, tokens) for seed in SEEDS],
            "lfm2moe": [Run("lfm2moe", rates["lfm2moe"], seed, tokens) for seed in SEEDS],
            "lfm2moe-6-layers": [Run("lfm2moe-6-layers", rates["lfm2moe"], SEEDS[0], tokens)],
        }
        # In the time that tiny takes, a faster LFM2 sees more tokens. (If tiny is faster, the comparison at equal tokens is
        # already the harder one for it.)
        for model, results in (("lfm2moe", rows["lfm2moe"]), ("lfm2moe-6-layers", rows["lfm2moe-6-layers"])):
            ratio = self.speed()["bfloat16"][model]["ratio"]
            if ratio < 1:
                rows[f"{model}-equal-time"] = [
                    Run(model, run.learning_rate, run.seed, round(tokens / ratio)) for run in results
                ]
        results = iter(self.train_all("seeds", [run for runs in rows.values() for run in runs]))
        return {row: [next(results) for _ in runs] for row, runs in rows.items()}

    def ablations(self) -> dict[str, list[dict]]:
        """Return the runs of each ablation, after those of `tiny` itself."""
        rate, tokens = self.best_rates()["tiny"], self.options.tokens
        default = self.train_all("seeds", [Run("tiny", rate, seed, tokens) for seed in SEEDS])
        runs = [Run(variant, rate, seed, tokens) for seed in ABLATION_SEEDS for variant in ABLATIONS]
        results = self.train_all("ablations", runs)
        return {"tiny": default} | {
            variant: [result for result in results if result["variant"] == variant] for variant in ABLATIONS
        }

    def train_all(self, part: str, runs: list[Run]) -> list[dict]:
        results = self.results(part, {run.name: asdict(run) for run in runs}, self.options.workers, self.threads)
        return [results[run.name] for run in runs]

    def results(self, part: str, tasks: dict[str, dict], workers: int, threads: int) -> dict[str, dict]:
        """Return the results of these tasks by name; tasks without a file are done first."""
        paths = {name: self.runs / f"{name}.json" for name in tasks}
        if part in self.to_discard:
            for name in tasks.keys() - self.discarded:
                paths[name].unlink(missing_ok=True)
            self.discarded |= tasks.keys()
        missing = [name for name in tasks if not paths[name].exists()]
        with ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(self.start, tasks[name], paths[name], threads) for name in missing]
            try:
                for done in as_completed(running):
                    done.result()
            finally:
                pool.shutdown(cancel_futures=True)
        return {name: json.loads(path.read_text()) for name, path in paths.items()}

    def start(self, task: dict, path: Path, threads: int) -> None:
        """Do one task in a process of its own, so that its memory can be measured."""
        keep_freed_memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # as train.py does on a CPU
        quiet = {"TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, __file__, "--data", self.options.data, "--out", self.options.out]
        subprocess.run(
            [*command, "--task", json.dumps(task), "--result", path],
            env={**os.environ, **keep_freed_memory, **quiet, "OMP_NUM_THREADS": str(threads)},
            check=True,
        )


def do_task(task: dict, corpus: Path, path: Path) -> None:
    """Do the task of the parent process; the file appears when it is complete."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "speed_steps" in task:
        result = measure_speed(training_stream(corpus), task["speed_steps"])
    else:
        result = train(Run(**task), corpus)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(path)


def best_rate(results: list[dict]) -> float:
    """Return the learning rate of the run with the fewest bits; runs that diverged are left out."""
    finite = [result for result in results if math.isfinite(result["bits_per_byte"])]
    return min(finite, key=lambda result: result["bits_per_byte"])["learning_rate"]


def speed_table(speed: dict, _: dict) -> list[str]:
    tokens_per_second = "tokens/s, and the step time over tiny's"
    lines = [
        f"Whole training steps by turns, {speed['threads']} threads, machine's load before: {speed['load_before']:.1f}",
        "",
        f"| model | bf16: {tokens_per_second} | fp32: {tokens_per_second} |",
        "|---|---|---|",
        f"| tiny | {tokens_of(speed, 'tiny')} | {tokens_of(speed, 'tiny', 'float32')} |",
    ]
    for name in speed["float32"]:
        cells = [
            f"{tokens_of(speed, name, dtype)}, {relative_time(speed, name, dtype)}" for dtype in ("bfloat16", "float32")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return lines


def sweep_table(sweep: dict[str, list[dict]], _: dict) -> list[str]:
    lines = [f"| learning rate | {' | '.join(sweep)} |", "|---|---|---|"]
    for results in zip(*sweep.values(), strict=True):
        bits = " | ".join(f"{result['bits_per_byte']:.4f}" for result in results)
        lines.append(f"| {results[0]['learning_rate']:g} | {bits} |")
    for model, results in sweep.items():
        if best_rate(results) in (RATES[0], RATES[-1]):
            lines += ["", f"The best rate of {model} is at the end of the range: a better one may lie beyond."]
    return lines


def seeds_table(seeds: dict[str, list[dict]], speed: dict) -> list[str]:
    lines = [
        "| model | total | active | learning rate | tokens | bits/byte | tokens/s (by turns) | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, results in seeds.items():
        first, bits = results[0], [result["bits_per_byte"] for result in results]
        spread = f" ± {(max(bits) - min(bits)) / 2:.4f}" if len(bits) > 1 else " (one seed)"
        memory = max(result["peak_memory_megabytes"] for result in results)
        lines.append(
            f"| {row} | {first['parameters']['total']:,} | {first['parameters']['active']:,} "
            f"| {first['learning_rate']:g} | {first['trained_tokens']:,} | {sum(bits) / len(bits):.4f}{spread} "
            f"| {tokens_of(speed, first['variant'])} | {memory:,.0f} MB |"
        )
    lines += ["", "While training, first seed, on the first rows of the validation:", ""]
    lines += ["| tokens | tiny | lfm2moe |", "|---|---|---|"]
    for tiny, lfm2 in zip(seeds["tiny"][0]["curve"], seeds["lfm2moe"][0]["curve"], strict=True):
        lines.append(f"| {tiny['tokens']:,} | {tiny['bits_per_byte']:.4f} | {lfm2['bits_per_byte']:.4f} |")
    return lines


def ablations_table(ablations: dict[str, list[dict]], speed: dict) -> list[str]:
    lines = [
        f"Means of {len(ABLATION_SEEDS)} seeds; `tie`: the difference is no larger than that of the default's own seeds.",
        "",
        "| variant | parameters | bits/byte | difference | step time |",
        "|---|---|---|---|---|",
    ]
    default = [result["bits_per_byte"] for result in ablations["tiny"]]
    for variant, results in ablations.items():
        first, compared = results[0], results[: len(ABLATION_SEEDS)]
        mean = sum(result["bits_per_byte"] for result in compared) / len(compared)
        difference = mean - sum(default[: len(ABLATION_SEEDS)]) / len(ABLATION_SEEDS)
        tie = " tie" if variant != "tiny" and abs(difference) <= max(default) - min(default) else ""
        time_taken = "1" if variant == "tiny" else relative_time(speed, variant)
        lines.append(
            f"| {variant} | {first['parameters']['total']:,} | {mean:.4f} | {difference:+.4f}{tie} | {time_taken} |"
        )
    return lines


def tokens_of(speed: dict, name: str, dtype: str = "bfloat16") -> str:
    """Return tokens per second; `tiny`'s are from its turns with LFM2."""
    timing = speed[dtype]["lfm2moe" if name == "tiny" else name]
    return f"{TOKENS_PER_STEP / timing['tiny_seconds' if name == 'tiny' else 'seconds']:,.0f}"


def relative_time(speed: dict, name: str, dtype: str = "bfloat16") -> str:
    timing = speed[dtype][name]
    return f"{timing['ratio']:.3f} ± {timing['ratio_standard_error']:.3f}"


TABLES = {"speed": speed_table, "sweep": sweep_table, "seeds": seeds_table, "ablations": ablations_table}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="parquet or JSON-lines files with question and answer columns, or `sample`")
    add("--out", type=Path, default=Path("runs/quality"), help="shards, runs and report.md (default: %(default)s)")
    add("--only", choices=PARTS, help="do only this part and what it needs (default: all)")
    add("--tokens", type=int, default=1_000_000, help="tokens of a run in seeds and ablations (default: %(default)s)")
    add("--sweep-tokens", type=int, default=250_000, help="tokens of a run in the sweep (default: %(default)s)")
    add("--learning-rate", type=float, help="rate of seeds and ablations (default: each model's best in the sweep)")
    add("--speed-steps", type=int, default=20, help="steps of each model of a pair (default: %(default)s)")
    add("--workers", type=int, default=2, help="runs at once, except in speed (default: %(default)s)")
    add("--threads", type=int, help="threads of each run; speed takes workers x threads (default: cores / workers)")
    add("--fresh", action="store_true", help="discard the results of earlier commands first")
    add("--task", type=json.loads, help=argparse.SUPPRESS)  # the task of a process that this one starts
    add("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.speed_steps < 2:
        parser.error("--speed-steps must be at least 2")
    return options


def main() -> None:
    options = parse_arguments()
    benchmark = Benchmark(options)
    if options.task is not None:
        do_task(options.task, benchmark.corpus, options.result)
        return
    check_sizes()
    try:
        prepare_corpus(options.data, benchmark.corpus)
        results = {part: getattr(benchmark, part)() for part in PARTS if options.only in (None, part)}
        speed = benchmark.speed() if results.keys() != {"sweep"} else {}
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"a run ended with {error.returncode} (its message is above; -9 means killed, often because memory ran out); "
            "the finished runs are kept, and the same command does the missing ones"
        )
    report = "\n".join("\n".join(TABLES[part](result, speed)) + "\n" for part, result in results.items())
    (options.out / "report.md").write_text(report)
    print(report)


if __name__ == "__main__":
    with one_sentence_errors():
        main()

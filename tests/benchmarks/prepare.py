"""How fast is `lfm prepare`, where does its time go, and how fast are other ways to the same tokens?

    python -m tests.benchmarks.prepare --data FOLDER --tokenizer FOLDER [--workers N] [--repeat 5]

The whole command runs on the corpus and on `repeat` different copies of it, each in a process of its own; the difference
gives the steady speed, without start-up. Then, on a part of the rows, in the same run:

  tokenizers     the tokenizer's own batch encoder, all cores, nothing else
  datasets       datasets.map with the tokenizer, in batches and N processes, then webdataset's ShardWriter
  datatrove      its tokenizer pipeline with N workers

MB are of question and answer text. The time of the others includes their worker processes, but not their imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import psutil

from data_pipeline.preparation.job import Seconds
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from tests.benchmarks.corpus import megabytes, open_corpus, rows_of
from tests.benchmarks.measurement import Options, Row, rates, seconds_of, take_turns

SLOW_ROWS = 10_000  # for the slow ways, whose speed does not depend on the number of rows
STEPS = ("read", "clean", "encode", "keys", "keep", "load", "pack", "write")
SEQ_LEN = 2048
COPIES = 5


@dataclass(frozen=True)
class Preparation:
    """The settings of every way: the tokenizer's folder, tokens in a packed row, processes."""

    tokenizer: Path
    seq_len: int = SEQ_LEN
    workers: int = len(os.sched_getaffinity(0))


def measure(options: Options) -> list[Row]:
    """Measure the whole command and its steady speed beside datatrove and `datasets.map`, in MB/s."""
    corpus = open_corpus(options)
    preparation = Preparation(corpus.tokenizer)
    folder = options.scratch / "prepare"
    folder.mkdir()
    for name, copies in (("once", 1), ("many", COPIES)):
        copy_corpus(corpus.rows, folder / name, copies)
    ways: dict[str, Callable[[], float]] = {
        name: lambda name=name: run_command(preparation, folder / name, folder / "out")["seconds"]
        for name in ("once", "many")
    }
    part = corpus.rows.head(SLOW_ROWS)
    others, missing = available_ways({name: SLOW_WAYS[name] for name in PEER_NAMES}, part, preparation, folder)
    seconds = take_turns({**ways, **others}, options.repeats(3))
    shutil.rmtree(folder)

    speeds = {name: rates(megabytes(part), seconds[name]) for name in others}
    added = [many - once for once, many in zip(seconds["once"], seconds["many"], strict=True)]
    ours = {
        "the whole command, start-up included": rates(corpus.megabytes, seconds["once"]),
        "steady, without start-up": rates((COPIES - 1) * corpus.megabytes, added),
    }
    return [
        Row(f"`lfm prepare`: {what}", "MB/s", figures, peer, speeds.get(name, ()), not_run=missing.get(name, ""))
        for what, figures in ours.items()
        for name, peer in PEER_NAMES.items()
    ]


def copy_corpus(rows: pl.DataFrame, folder: Path, copies: int) -> None:
    """Write a corpus several times, with different rows in every copy."""
    folder.mkdir()
    for copy in range(copies):
        changed = rows if copy == 0 else rows.with_columns(pl.col("answer") + f" ({copy})")
        changed.write_parquet(folder / f"copy-{copy}.parquet", row_group_size=4000, compression="zstd")


def run_command(preparation: Preparation, source: Path, out: Path) -> dict:
    """Run `lfm prepare` on a folder; return its seconds, CPU seconds and the peak memory of all its processes.

    Its output is deleted. Raises `subprocess.CalledProcessError` if it fails.
    """
    command = [sys.executable, "-m", "launcher.cli", "prepare", str(source), "--out", str(out)]
    command += ["--tokenizer", str(preparation.tokenizer)]
    command += ["--seq-len", str(preparation.seq_len), "--workers", str(preparation.workers)]
    before, begun = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = PeakMemory(process.pid)
    code = process.wait()
    seconds, after = time.perf_counter() - begun, os.times()
    bytes_of_memory = peak.stop()
    if code != 0:
        raise subprocess.CalledProcessError(code, command)
    shutil.rmtree(out)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu": cpu, "megabytes": bytes_of_memory / 1e6}


class PeakMemory:
    """The peak memory of a process and its children; pages that they share count for each of them."""

    def __init__(self, pid: int) -> None:
        self._process, self._peak, self._running = psutil.Process(pid), 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._running:
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self._peak = max(self._peak, sum(member.memory_info().rss for member in family))
            except psutil.NoSuchProcess:
                pass  # one has ended since it was listed
            time.sleep(0.05)

    def stop(self) -> int:
        self._running = False
        self._thread.join()
        return self._peak


def tokenizers_alone(rows: pl.DataFrame, preparation: Preparation, folder: Path) -> Callable[[], float]:
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(preparation.tokenizer).backend_tokenizer
    texts = [*rows["question"], *rows["answer"]]
    return lambda: seconds_of(lambda: backend.encode_batch_fast(texts, add_special_tokens=False))


def datasets_map(rows: pl.DataFrame, preparation: Preparation, folder: Path) -> Callable[[], float]:
    import datasets
    import webdataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(preparation.tokenizer)
    dataset = datasets.Dataset.from_dict(rows.select("question", "answer").to_dict(as_series=False))

    def encode(batch: dict) -> dict:
        return {"ids": tokenizer(batch["question"], batch["answer"]).input_ids}

    def run() -> None:
        encoded = dataset.map(
            encode,
            batched=True,
            num_proc=preparation.workers,
            remove_columns=["question", "answer"],
            load_from_cache_file=False,
        )
        with webdataset.ShardWriter(str(folder / "slow-%05d.tar"), verbose=0) as writer:
            for number, row in enumerate(encoded):
                writer.write({"__key__": f"{number:08d}", "ids.json": json.dumps(row["ids"]).encode()})

    return lambda: seconds_of(run)


def datatrove_pipeline(rows: pl.DataFrame, preparation: Preparation, folder: Path) -> Callable[[], float]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from transformers import AutoTokenizer

    source = folder / "datatrove-in"
    source.mkdir()
    texts = rows.select(text=pl.col("question") + "\n" + pl.col("answer"), id=pl.int_range(pl.len()).cast(pl.String))
    for part in range(preparation.workers):
        texts.gather_every(preparation.workers, part).write_ndjson(source / f"{part}.jsonl")
    tokenizer = str(folder / "datatrove-tokenizer.json")  # LED's own folder has none
    AutoTokenizer.from_pretrained(preparation.tokenizer).backend_tokenizer.save(tokenizer)
    numbers = itertools.count()

    def run() -> float:
        out = folder / f"datatrove-{next(numbers)}"  # datatrove skips work that its logs record as done
        writer = DocumentTokenizer(str(out / "out"), tokenizer_name_or_path=tokenizer, shuffle_documents=False)
        executor = LocalPipelineExecutor(
            [JsonlReader(str(source)), writer],
            tasks=preparation.workers,
            workers=preparation.workers,
            logging_dir=str(out / "logs"),
        )
        return seconds_of(executor.run)

    return run


SLOW_WAYS = {"tokenizers": tokenizers_alone, "datasets": datasets_map, "datatrove": datatrove_pipeline}
PEER_NAMES = {"datatrove": "datatrove", "datasets": "`datasets.map`, ShardWriter"}


def available_ways(
    ways: dict[str, Callable], rows: pl.DataFrame, preparation: Preparation, folder: Path
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return the ways that can run, as functions that run once and return seconds, and why the others cannot."""
    available, missing = {}, {}
    for name, way in ways.items():
        try:
            available[name] = way(rows, preparation, folder)
        except ImportError as error:
            missing[name] = str(error)
    return available, missing


def main() -> None:
    options = parse_arguments()
    preparation = Preparation(options.tokenizer, options.seq_len, options.workers)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        rows = rows_of(options.data)
        once, many = folder / "once", folder / "many"
        copy_corpus(rows, once, 1)
        copy_corpus(rows, many, options.repeat)
        print(
            f"{megabytes(rows):.1f} MB of text in {len(rows):,} rows, {options.workers} workers, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        timings = {}
        for name, source in (("once", once), ("many", many)):
            timings[name] = run_command(preparation, source, folder / f"{name}-out")
            print(
                f"whole command, {'the corpus' if name == 'once' else f'{options.repeat} x the corpus'}: "
                f"{timings[name]['seconds']:.2f} s, {timings[name]['cpu']:.2f} s of CPU, "
                f"peak {timings[name]['megabytes']:,.0f} MB over all processes"
            )
        for kind, seconds in (("wall time", "seconds"), ("CPU time, per core", "cpu")):
            more = (options.repeat - 1) * megabytes(rows)
            spent = timings["many"][seconds] - timings["once"][seconds]
            print(f"steady, by {kind}: {more / spent:.1f} MB/s")
        print_steps(preparation, once, folder / "steps", megabytes(rows))
        print_slow_ways(rows.head(SLOW_ROWS), preparation, folder)


def print_steps(preparation: Preparation, source: Path, out: Path, megabytes: float) -> None:
    """Print the time of each step, in one process, so that no process waits for another."""
    seconds = Seconds()
    settings = Settings(tokenizer=str(preparation.tokenizer), seq_len=preparation.seq_len)
    total = seconds_of(lambda: prepare(str(source), out, settings, workers=1, progress=False, seconds=seconds))
    print(f"\none process, {total:.2f} s in all:\n\n| step | seconds | MB/s |\n|---|---|---|")
    for step in [*STEPS, "select"]:
        print(f"| {step} | {seconds[step]:.2f} | {megabytes / seconds[step]:,.0f} |")
    print(f"| tokenizer, start and index | {total - seconds.total():.2f} | |\n")


def print_slow_ways(rows: pl.DataFrame, preparation: Preparation, folder: Path) -> None:
    print(f"the slow ways, on {len(rows):,} rows:\n\n| way | MB/s |\n|---|---|")
    available, missing = available_ways(SLOW_WAYS, rows, preparation, folder)
    for name, way in available.items():
        print(f"| {name} | {megabytes(rows) / way():.2f} |", flush=True)
    for name, reason in missing.items():
        print(f"| {name} | not run: {reason} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="parquet or JSON-lines files with question and answer columns")
    add("--tokenizer", required=True, type=Path, help="a folder with an LED tokenizer")
    add("--seq-len", type=int, default=SEQ_LEN, help="tokens in a packed row (default: %(default)s)")
    add("--workers", type=int, default=Preparation.workers, help="processes (default: the cores, %(default)s)")
    add("--repeat", type=int, default=COPIES, help="copies of the corpus for the steady speed (default: %(default)s)")
    add("--scratch", help="where to write corpora and shards (default: the system's temporary folder)")
    options = parser.parse_args()
    if options.repeat < 2:
        parser.error("--repeat must be at least 2: the steady speed comes from a difference")
    return options


if __name__ == "__main__":
    main()

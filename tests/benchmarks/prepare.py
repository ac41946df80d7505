"""How fast is `lfm prepare`, where does its time go, and how fast are other ways to the same tokens?

    python -m tests.benchmarks.prepare --data FOLDER --tokenizer FOLDER [--workers N] [--repeat 5]

The whole command runs on the corpus and on `repeat` different copies of it, each in a process of its own; from the
difference comes the steady speed, without start-up. Then, on a part of the rows, in the same run:

  tokenizers     the tokenizer's own batch encoder, all cores, nothing else
  datasets       datasets.map with the tokenizer, in batches and as many processes, then webdataset's ShardWriter
  datatrove      its tokenizer pipeline with as many workers (pip install --no-deps datatrove loguru humanize orjson)

MB are those of question and answer text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import polars as pl
import psutil

from data_pipeline.preparation.encode_chunks import Seconds
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.sources.source import open_source

SLOW_ROWS = 10_000  # of the slow ways: their speed does not depend on how many
STEPS = ("read", "clean", "encode", "keys", "keep", "load", "pack", "write")


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        rows = pl.concat(open_source(options.data).frames())
        once, many = folder / "once", folder / "many"
        copy_corpus(rows, once, 1)
        copy_corpus(rows, many, options.repeat)
        megabytes = rows.select(pl.col("question", "answer").str.len_bytes().sum()).sum_horizontal().item() / 1e6
        print(
            f"{megabytes:.1f} MB of text in {len(rows):,} rows, {options.workers} workers, load {os.getloadavg()[0]:.1f}"
        )
        timings = {}
        for name, source in (("once", once), ("many", many)):
            timings[name] = run_command(options, source, folder / f"{name}-out")
            print(
                f"whole command, {'the corpus' if name == 'once' else f'{options.repeat} x the corpus'}: "
                f"{timings[name]['seconds']:.2f} s, {timings[name]['cpu']:.2f} s of CPU, "
                f"peak {timings[name]['megabytes']:,.0f} MB over all processes"
            )
        for kind, seconds in (("wall time", "seconds"), ("CPU time, per core", "cpu")):
            more = (options.repeat - 1) * megabytes
            spent = timings["many"][seconds] - timings["once"][seconds]
            print(f"steady, by {kind}: {more / spent:.1f} MB/s")
        print_steps(options, once, folder / "steps", megabytes)
        part = rows.head(SLOW_ROWS)
        print_slow_ways(part, options, folder)


def copy_corpus(rows: pl.DataFrame, folder: Path, copies: int) -> None:
    """Write a corpus several times, each row in each copy a different one."""
    folder.mkdir()
    for copy in range(copies):
        changed = rows if copy == 0 else rows.with_columns(pl.col("answer") + f" ({copy})")
        changed.write_parquet(folder / f"copy-{copy}.parquet", row_group_size=4000, compression="zstd")


def run_command(options: argparse.Namespace, source: Path, out: Path) -> dict:
    """Run `lfm prepare` on a folder; gives its seconds, CPU seconds and the highest memory of all its processes."""
    command = [sys.executable, "-m", "launcher.cli", "prepare", source, "--out", out, "--tokenizer", options.tokenizer]
    command += ["--seq-len", str(options.seq_len), "--workers", str(options.workers)]
    before, begun = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = PeakMemory(process.pid)
    if process.wait() != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    seconds, after = time.perf_counter() - begun, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu": cpu, "megabytes": peak.stop() / 1e6}


class PeakMemory:
    """The highest sum of the memory of a process and its children; pages that they share count once for each."""

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


def print_steps(options: argparse.Namespace, source: Path, out: Path, megabytes: float) -> None:
    """Where the time goes: one process, so that nothing waits for another; CPU time of one thread where it can be had."""
    seconds = Seconds()
    settings = Settings(tokenizer=options.tokenizer, seq_len=options.seq_len)
    begun = time.perf_counter()
    prepare(str(source), out, settings, workers=1, progress=False, seconds=seconds)
    total = time.perf_counter() - begun
    print(f"\none process, {total:.2f} s in all:\n\n| step | seconds | MB/s |\n|---|---|---|")
    for step in [*STEPS, "select"]:
        print(f"| {step} | {seconds[step]:.2f} | {megabytes / seconds[step]:,.0f} |")
    print(f"| tokenizer, start and index | {total - seconds.total():.2f} | |\n")


def print_slow_ways(rows: pl.DataFrame, options: argparse.Namespace, folder: Path) -> None:
    megabytes = rows.select(pl.col("question", "answer").str.len_bytes().sum()).sum_horizontal().item() / 1e6
    print(f"the slow ways, on {len(rows):,} rows:\n\n| way | MB/s |\n|---|---|")
    for name, way in (("tokenizers", tokenizers_alone), ("datasets", datasets_map), ("datatrove", datatrove_pipeline)):
        try:
            seconds = way(rows, options, folder)
        except ImportError as error:
            print(f"| {name} | not run: {error} |")
        else:
            print(f"| {name} | {megabytes / seconds:.2f} |", flush=True)


def tokenizers_alone(rows: pl.DataFrame, options: argparse.Namespace, folder: Path) -> float:
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(options.tokenizer).backend_tokenizer
    texts = [*rows["question"], *rows["answer"]]
    begun = time.perf_counter()
    backend.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - begun


def datasets_map(rows: pl.DataFrame, options: argparse.Namespace, folder: Path) -> float:
    import datasets
    import webdataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    dataset = datasets.Dataset.from_dict(rows.select("question", "answer").to_dict(as_series=False))

    def encode(batch: dict) -> dict:
        return {"ids": tokenizer(batch["question"], batch["answer"]).input_ids}

    begun = time.perf_counter()
    encoded = dataset.map(encode, batched=True, num_proc=options.workers, remove_columns=["question", "answer"])
    with webdataset.ShardWriter(str(folder / "slow-%05d.tar"), verbose=0) as writer:
        for number, row in enumerate(encoded):
            writer.write({"__key__": f"{number:08d}", "ids.json": json.dumps(row["ids"]).encode()})
    return time.perf_counter() - begun


def datatrove_pipeline(rows: pl.DataFrame, options: argparse.Namespace, folder: Path) -> float:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    source = folder / "datatrove-in"
    source.mkdir()
    texts = rows.select(text=pl.col("question") + "\n" + pl.col("answer"), id=pl.int_range(pl.len()).cast(pl.String))
    for part in range(options.workers):
        texts.gather_every(options.workers, part).write_ndjson(source / f"{part}.jsonl")
    tokenizer = Path(options.tokenizer) / "tokenizer.json"
    pipeline = [
        JsonlReader(str(source)),
        DocumentTokenizer(
            str(folder / "datatrove-out"), tokenizer_name_or_path=str(tokenizer), shuffle_documents=False
        ),
    ]
    begun = time.perf_counter()
    LocalPipelineExecutor(
        pipeline, tasks=options.workers, workers=options.workers, logging_dir=str(folder / "datatrove-logs")
    ).run()
    return time.perf_counter() - begun


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="parquet or JSON-lines files with question and answer columns")
    add("--tokenizer", required=True, help="a folder with an LED tokenizer")
    add("--seq-len", type=int, default=2048, help="tokens in a packed row (default: %(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores, %(default)s)")
    add("--repeat", type=int, default=5, help="copies of the corpus for the steady speed (default: %(default)s)")
    add("--scratch", help="where to write corpora and shards (default: the system's temporary folder)")
    options = parser.parse_args()
    if options.repeat < 2:
        parser.error("--repeat must be at least 2: the steady speed comes from a difference")
    return options


if __name__ == "__main__":
    main()

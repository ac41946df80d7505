"""What near duplicates and contamination cost; by hand: `python -m tests.benchmarks.deduplicate DATA [--rows N]`.

DATA is a parquet file or a folder of them, with the columns question and answer. Time is the CPU time of all threads, so
MB/s are per core. The global step is run a second time on N synthetic rows (default: 2,335,220, as many as WebInstructSub
has). They are random signatures, and every twentieth is a near copy of an earlier row. As in a real run, the signatures are
in memory-mapped files.
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data_pipeline.deduplication.contamination import EvaluationSet
from data_pipeline.deduplication.near_duplicates import BORROWED, NearDuplicateSettings, duplicates, signatures

CHUNK_ROWS = 8192
WEBINSTRUCT_ROWS = 2_335_220
EVALUATION_ROWS = 1000
COPY_EVERY = 20
COPY_SIMILARITY = 0.95


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a function's result and its CPU seconds."""
    start = time.process_time()
    return function(), time.process_time() - start


def peak_memory(function: Callable[[], Any]) -> int:
    """Return the peak memory of Python and numpy in bytes while a function runs, without memory-mapped files."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def synthetic_signatures(folder: Path, rows: int, bins: int) -> Iterator[np.ndarray]:
    """Write chunks of signatures, of different rows and of near copies, and yield them mapped into memory."""
    for start in range(0, rows, CHUNK_ROWS):
        generator = np.random.default_rng(start)
        chunk = generator.integers(0, BORROWED, (min(CHUNK_ROWS, rows - start), bins), dtype=np.uint16)
        if start:
            earlier = np.load(folder / f"{generator.integers(start // CHUNK_ROWS)}.npy", mmap_mode="r")
            copied = chunk[::COPY_EVERY]
            equal = generator.random(copied.shape) < COPY_SIMILARITY
            copied[equal] = earlier[: len(chunk) : COPY_EVERY][equal]
        file = folder / f"{start // CHUNK_ROWS}.npy"
        np.save(file, chunk)
        yield np.load(file, mmap_mode="r")


def measure_texts(frame: pl.DataFrame, settings: NearDuplicateSettings, folder: Path) -> None:
    chunks = list(frame.iter_slices(CHUNK_ROWS))
    megabytes = sum(int(frame[name].str.len_bytes().sum()) for name in ("question", "answer")) / 1e6
    print(f"{len(frame):,} rows, {megabytes:.1f} MB of question and answer, chunks of {CHUNK_ROWS:,} rows")

    def sign() -> list[np.ndarray]:
        return [signatures(chunk["question"], chunk["answer"], settings) for chunk in chunks]

    found, seconds = timed(sign)
    memory = peak_memory(lambda: signatures(chunks[0]["question"], chunks[0]["answer"], settings))
    print(f"signatures:          {megabytes / seconds:7.1f} MB/s, {memory / 1e6:.0f} MB of memory for a chunk")
    drop, seconds = timed(lambda: duplicates(found, np.ones(len(frame), dtype=bool), settings))
    print(f"duplicates:          {seconds:7.2f} s, {drop.sum():,} rows dropped")

    file = folder / "evaluation.jsonl"
    evaluation_rows = frame.gather_every(max(1, len(frame) // EVALUATION_ROWS)).select("question", "answer")
    file.write_text("".join(json.dumps(row) + "\n" for row in evaluation_rows.iter_rows(named=True)), encoding="utf-8")
    evaluation, seconds = timed(lambda: EvaluationSet([file]))
    print(f"evaluation set:      {seconds:7.2f} s for {evaluation.texts:,} texts")
    flags, seconds = timed(lambda: [evaluation.contaminated(chunk["question"], chunk["answer"]) for chunk in chunks])
    rows = sum(int(flag.sum()) for flag in flags)
    print(f"contamination:       {megabytes / seconds:7.1f} MB/s, {rows:,} rows contaminated")


def measure_global_step(rows: int, settings: NearDuplicateSettings, folder: Path) -> None:
    chunks = list(synthetic_signatures(folder, rows, settings.permutations))
    eligible = np.ones(rows, dtype=bool)
    on_disk = sum(file.stat().st_size for file in folder.glob("*.npy"))
    drop, seconds = timed(lambda: duplicates(chunks, eligible, settings))
    memory = peak_memory(lambda: duplicates(chunks, eligible, settings))
    print(f"{rows:,} synthetic rows: {on_disk / rows:.1f} bytes a row on disk, {on_disk / 1e6:.0f} MB")
    print(
        f"duplicates:          {seconds:7.2f} s, {memory / rows:.1f} bytes of memory a row, {drop.sum():,} rows dropped"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a parquet file, or a folder of them")
    parser.add_argument(
        "--rows", type=int, default=WEBINSTRUCT_ROWS, help="rows of the synthetic global step; 0 skips it"
    )
    arguments = parser.parse_args()
    files = sorted(arguments.data.glob("*.parquet")) if arguments.data.is_dir() else [arguments.data]
    settings = NearDuplicateSettings()
    print(f"{settings}, {settings.bands} bands of {settings.rows_per_band} bins")
    with tempfile.TemporaryDirectory() as folder:
        measure_texts(pl.read_parquet(files, columns=["question", "answer"]), settings, Path(folder))
        if arguments.rows:
            measure_global_step(arguments.rows, settings, Path(folder))


if __name__ == "__main__":
    main()

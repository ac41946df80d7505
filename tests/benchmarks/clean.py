"""What cleaning costs, rule by rule, by hand: `python -m tests.benchmarks.clean DATA` (a folder of parquet files).

The speed is in MB of question and answer text per second of CPU time, with one polars thread: the best of three. The first
line is the CPU time of `lfm prepare` for cleaning, which takes the questions and answers of a frame together.
"""

import os
import sys
import time
from pathlib import Path

os.environ["POLARS_MAX_THREADS"] = "1"  # polars reads it once

import polars as pl

from data_pipeline.cleaning.clean import DEFAULT_OPTIONS, RULES, clean
from data_pipeline.preparation.row_texts import RowTexts

ROWS_PER_CHUNK = 8192
TEXTS = pl.col("question", "answer")


def main(folder: str) -> None:
    rows = pl.read_parquet(sorted(Path(folder).glob("*.parquet")), columns=["question", "answer"])
    chunks = [rows.slice(first, ROWS_PER_CHUNK).rechunk() for first in range(0, len(rows), ROWS_PER_CHUNK)]
    megabytes = sum(rows.select(TEXTS.str.len_bytes().sum()).row(0)) / 1e6
    frames = [RowTexts(chunk["question"], chunk["answer"]) for chunk in chunks]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for frame in frames:
            frame.cleaned(DEFAULT_OPTIONS)
        seconds.append(time.process_time() - start)
    print(f"{'as in lfm prepare':27}{megabytes / min(seconds):7.0f} MB/s {min(seconds):7.2f} s")
    for name, rule in {"all rules": clean, **RULES}.items():
        seconds = []
        for _ in range(3):
            start = time.process_time()
            cleaned = pl.concat(chunk.select(rule(TEXTS)) for chunk in chunks)
            seconds.append(time.process_time() - start)
        changed = sum((cleaned[column] != rows[column]).sum() for column in cleaned.columns)
        print(f"{name:27}{megabytes / min(seconds):7.0f} MB/s {changed:7} of {2 * len(rows)} texts changed")


if __name__ == "__main__":
    main(sys.argv[1])

"""Prepare a corpus at its full size: time, memory and counts, and the same bytes after a kill.

    python -m tests.benchmarks.full_size --data FOLDER --tokenizer FOLDER [--copies 24] [--scratch FOLDER]

The corpus is FOLDER's parquet files, repeated with other digits. 24 copies of 96,898 rows have the size of WebInstructSub.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from tests.benchmarks.prepare import PeakMemory

ROW_GROUP = 8192
KILLED_AT = 0.5  # share of the time of an undisturbed preparation


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of parquet files with question and answer")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--copies", type=int, default=24, help="how often the rows are repeated (default: %(default)s)")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder on a fast disk (default: %(default)s)")
    return parser.parse_args()


def write_copies(data: Path, folder: Path, copies: int) -> tuple[int, float]:
    """Write the corpus with its digits moved on by the number of the copy; return its rows and its MB of text."""
    rows, megabytes = 0, 0.0
    for file in sorted(data.rglob("*.parquet")):
        columns = [name for name in pl.read_parquet_schema(file) if name in ("question", "answer", "source")]
        frame = pl.read_parquet(file, columns=columns)
        for copy in range(copies):
            digits = [str((digit + copy) % 10) for digit in range(10)]
            texts = pl.col("question", "answer").str.replace_many(list("0123456789"), digits)
            changed = frame.with_columns(texts).with_columns(pl.col("question") + f" ({copy})")
            changed.write_parquet(
                folder / f"{file.stem}-{copy:02}.parquet", row_group_size=ROW_GROUP, compression="zstd"
            )
            rows += len(changed)
            megabytes += (
                changed.select(pl.col("question", "answer").str.len_bytes().sum()).sum_horizontal().item() / 1e6
            )
    return rows, megabytes


def start(source: Path, out: Path, tokenizer: str) -> subprocess.Popen:
    """Start `lfm prepare`."""
    command = [
        sys.executable,
        "-m",
        "launcher.cli",
        "prepare",
        str(source),
        "--out",
        str(out),
        "--tokenizer",
        tokenizer,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(source: Path, out: Path, tokenizer: str) -> tuple[float, float]:
    """Prepare a folder; return the seconds, and the highest memory of all processes in MB."""
    begun = time.perf_counter()
    process = start(source, out, tokenizer)
    peak = PeakMemory(process.pid)
    if code := process.wait():
        raise subprocess.CalledProcessError(code, process.args)
    return time.perf_counter() - begun, peak.stop() / 1e6


def digest(out: Path) -> str:
    """Hash the hashes of all files, which the index lists."""
    return hashlib.sha256((out / "index.json").read_bytes()).hexdigest()


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        corpus, whole, killed = (Path(scratch, name) for name in ("corpus", "whole", "killed"))
        corpus.mkdir()
        rows, megabytes = write_copies(options.data, corpus, options.copies)
        print(f"{rows:,} rows, {megabytes:,.0f} MB of text", flush=True)

        seconds, memory = run(corpus, whole, options.tokenizer)
        counts = json.loads((whole / "index.json").read_text())["counts"]
        kept, dropped = counts["documents"] + counts["validation_documents"], sum(counts["rows_dropped"].values())
        print(f"prepared in {seconds:.0f} s, {megabytes / seconds:.0f} MB/s, peak {memory:,.0f} MB over all processes")
        print(
            f"{counts['rows_in']:,} rows = {kept:,} kept + {dropped:,} dropped; each copy drops {dropped / options.copies:g}"
        )
        if counts["rows_in"] != rows or kept + dropped != rows or dropped % options.copies:
            sys.exit("the counts are wrong")
        before = digest(whole)
        shutil.rmtree(whole)

        process = start(corpus, killed, options.tokenizer)
        time.sleep(KILLED_AT * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (killed / "index.json").exists():
            sys.exit("the preparation was over before it could be killed: give more --copies")
        again, _ = run(corpus, killed, options.tokenizer)
        same = digest(killed) == before
        print(
            f"killed after {KILLED_AT:.0%} of the time and resumed: {again:.0f} s more, {'the same' if same else 'OTHER'} bytes"
        )
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    main()

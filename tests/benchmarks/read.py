"""How fast are the readers of `lfm prepare` beside those of `datasets`, file by file, in one process each?

Both read the same file from its start and make frames of polars, a batch of rows at a time. `datasets` streams, so that it
writes no cache. Ours also check that all text is UTF-8.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import webdataset

from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.rows import ROWS_PER_FRAME
from data_pipeline.sources.source import open_source
from tests.benchmarks.corpus import made_up_rows, megabytes
from tests.benchmarks.measurement import Goal, Options, Row, cpu_seconds_of, rates, take_turns

ROWS, QUICK_ROWS = 60_000, 3_000
BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".parquet": "parquet",
}


def measure(options: Options) -> list[Row]:
    """Reading speed by the kind of file, in MB of question and answer text per second of processor time."""
    rows = made_up_rows(QUICK_ROWS if options.quick else ROWS)
    folder = options.scratch / "read"
    folder.mkdir()
    files = write_files(rows, folder)
    table = []
    for file in files:
        ways = {"ours": lambda file=file: cpu_seconds_of(lambda: read(file)), "datasets": datasets_reader(file)}
        seconds = take_turns(ways, options.repeats(3))
        ours, theirs = (rates(megabytes(rows), seconds[name]) for name in ways)
        kind = file.name.removeprefix("rows")
        table.append(
            Row(f"reading `{kind}`, processor time", "MB/s", ours, "`datasets`, streaming", theirs, Goal(at_least=1))
        )
    return table


def write_files(rows: pl.DataFrame, folder: Path) -> list[Path]:
    """Write the rows in every kind of file that `datasets` reads too."""
    rows.write_ndjson(folder / "rows.jsonl")
    (folder / "rows.json").write_text(json.dumps(rows.to_dicts()))
    rows.write_csv(folder / "rows.csv")
    rows.write_parquet(folder / "rows.parquet", row_group_size=8192)
    write_arrow(rows, folder / "rows.arrow")
    with webdataset.TarWriter(str(folder / "rows.tar")) as writer:
        for number, row in enumerate(rows.iter_rows(named=True)):
            writer.write({"__key__": f"{number:08}", "json": row})
    for name in ("rows.jsonl", "rows.csv"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), 6))
    return sorted(file for file in folder.iterdir() if file.is_file())


def write_arrow(rows: pl.DataFrame, path: Path) -> None:
    """Write a stream like `datasets` does: 1,000 rows in a batch."""
    import pyarrow as pa

    table = rows.to_arrow()
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def read(file: Path) -> int:
    """Read a file as `lfm prepare` does; gives its number of rows."""
    return sum(len(frame) for frame in open_source(str(file)).frames(BadRows()))


def datasets_reader(file: Path) -> Callable[[], float]:
    """Return a function that reads a file once with `datasets`, and gives its processor seconds."""
    import datasets

    builder = BUILDERS[file.suffixes[0]]

    def run() -> None:
        dataset = datasets.load_dataset(builder, data_files=str(file), split="train", streaming=True)
        if builder != "webdataset":  # it makes rows, not frames
            dataset = dataset.with_format("polars")
        for _ in dataset.iter(ROWS_PER_FRAME):
            pass

    return lambda: cpu_seconds_of(run)

"""Rows of question, answer and source: the built-in sample, parquet and jsonl files, or a dataset on the hub."""

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import polars as pl

from data_pipeline.errors import DataError

REQUIRED_COLUMNS = ("question", "answer")
COLUMNS = ("question", "answer", "source")
FILE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Source(Protocol):
    """Where rows come from.

    name: for people and for rows without a source of their own. num_rows: None where only reading tells.
    identity: what tells this input from another one, as JSON values, and holds no path of this machine.
    """

    name: str
    num_rows: int | None
    identity: list[dict]

    def batches(self, rows: int) -> Iterator[pl.DataFrame]:
        """Yields frames of up to `rows` rows with the string columns question, answer and source, in a fixed order."""


def open_source(source: str | list[str]) -> Source:
    """Opens `sample`, parquet or jsonl files (paths, folders, globs), or a dataset on the hub by its name.

    Raises DataError where that is none of them, or where the columns are missing.
    """
    parts = [source] if isinstance(source, str) else list(source)
    if parts == ["sample"]:
        return SampleSource()
    if len(parts) == 1 and not _is_local(parts[0]) and HUB_NAME.fullmatch(parts[0]):
        return HubSource(parts[0])
    return FileSource(parts)


class SampleSource:
    """The built-in sample corpus."""

    name = "sample"

    def __init__(self) -> None:
        from data_pipeline.sample import training_rows

        self._rows = [_values_of(row, "the sample", "sample") for row in training_rows()]
        self.num_rows = len(self._rows)
        digest = hashlib.sha256(json.dumps(self._rows).encode()).hexdigest()
        self.identity = [{"name": self.name, "rows": self.num_rows, "sha256": digest}]

    def batches(self, rows: int) -> Iterator[pl.DataFrame]:
        yield from _frames(iter(self._rows), rows)


class FileSource:
    """Parquet and jsonl files, read one after another in sorted order; no batch crosses a file."""

    def __init__(self, parts: list[str]) -> None:
        self._files = sorted({file for part in parts for file in _files_of(part)})
        if not self._files:
            raise DataError("no source is given: name files, a folder, a hub dataset, or `sample`")
        first, last = self._files[0].name, self._files[-1].name
        self.name = first if len(self._files) == 1 else f"{first} … {last}"
        self.identity = [{"name": file.name, "bytes": file.stat().st_size} for file in self._files]
        # Opening all of them now finds a truncated or foreign file before any work is done.
        rows = [_open_parquet(file).metadata.num_rows for file in self._files if file.suffix == ".parquet"]
        self.num_rows = sum(rows) if len(rows) == len(self._files) else None

    def batches(self, rows: int) -> Iterator[pl.DataFrame]:
        for file in self._files:
            if file.suffix == ".parquet":
                yield from _parquet_frames(file, rows)
            else:
                yield from _frames(_jsonl_rows(file), rows)


class HubSource:
    """The `train` split of a dataset on the hub, streamed."""

    def __init__(self, name: str) -> None:
        import datasets

        try:
            self._dataset = datasets.load_dataset(name, split="train", streaming=True)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"the source {name!r} is neither a path here nor a reachable hub dataset with a `train` split: "
                f"check the spelling, or the network ({str(error).strip().splitlines()[0]})"
            ) from error
        if self._dataset.column_names is not None:
            _require_columns(self._dataset.column_names, f"the hub dataset {name!r}")
            kept = [column for column in COLUMNS if column in self._dataset.column_names]
            self._dataset = self._dataset.select_columns(kept)
        self.name = name
        self.identity = [{"name": name}]
        splits = self._dataset.info.splits
        self.num_rows = splits["train"].num_examples if splits and "train" in splits else None

    def batches(self, rows: int) -> Iterator[pl.DataFrame]:
        where = f"the hub dataset {self.name!r}"
        try:
            yield from _frames((_values_of(row, where, self.name) for row in self._dataset), rows)
        except OSError as error:
            raise DataError(f"{where} stopped before its end: check the network and run again ({error})") from error


def _is_local(part: str) -> bool:
    looks_like_path = glob.has_magic(part) or part.startswith((".", "/", "~")) or part.endswith(FILE_SUFFIXES)
    return looks_like_path or Path(part).exists()


def _files_of(part: str) -> list[Path]:
    """Lists the files that one path, folder or glob stands for; raises DataError where it stands for none."""
    path = Path(part).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file()]
    elif path.exists():
        if not path.name.endswith(FILE_SUFFIXES):
            raise DataError(f"{part} is of no known kind: give {', '.join(FILE_SUFFIXES)} files")
        return [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    files = [file for file in found if file.name.endswith(FILE_SUFFIXES)]
    if not files:
        fault = "holds" if path.is_dir() else "does not exist, or matches"
        raise DataError(f"the source {part} {fault} no {', '.join(FILE_SUFFIXES)} file: check the path")
    return files


def _require_columns(found: Iterable[str], where: str) -> None:
    missing = [column for column in REQUIRED_COLUMNS if column not in found]
    if missing:
        raise DataError(
            f"{where} has no column {' and no column '.join(missing)}: it has {', '.join(found) or 'none'}, "
            f"and {' and '.join(REQUIRED_COLUMNS)} are required"
        )


def _open_parquet(file: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file: fetch it again or leave it out ({error})") from error
    _require_columns(parquet.schema_arrow.names, str(file))
    for column in COLUMNS:
        if column in parquet.schema_arrow.names:
            kind = parquet.schema_arrow.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise DataError(f"the column {column} of {file} holds {kind}, not text: convert it to strings")
    return parquet


def _parquet_frames(file: Path, rows: int) -> Iterator[pl.DataFrame]:
    import pyarrow as pa

    with _open_parquet(file) as parquet:
        columns = [column for column in COLUMNS if column in parquet.schema_arrow.names]
        for row_group in range(parquet.num_row_groups):
            try:
                for batch in parquet.iter_batches(batch_size=rows, row_groups=[row_group], columns=columns):
                    yield _text_frame(pl.from_arrow(pa.Table.from_batches([batch])), file)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{file} is corrupt in row group {row_group}: fetch it again or leave it out ({error})"
                ) from error


def _text_frame(frame: pl.DataFrame, file: Path) -> pl.DataFrame:
    if "source" not in frame.columns:
        frame = frame.with_columns(source=pl.lit(file.name))
    return frame.select(pl.col(column).cast(pl.String).fill_null("") for column in COLUMNS)


def _jsonl_rows(file: Path) -> Iterator[dict[str, str]]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = _parse_line(line, f"{file}, line {number}")
                    yield _values_of(row, f"{file}, line {number},", file.name)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be read after line {number}: fetch it again or leave it out ({error})"
        ) from error


def _parse_line(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: correct or remove it ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object: every line must hold one row")
    return row


def _values_of(row: dict, where: str, default_source: str) -> dict[str, str]:
    """Picks the three columns of one row; raises DataError where one is missing or is no text."""
    _require_columns(row, where)
    values = {column: row[column] for column in REQUIRED_COLUMNS} | {"source": row.get("source", default_source)}
    for column, value in values.items():
        if value is None:
            values[column] = ""
        elif not isinstance(value, str):
            raise DataError(f"{where} holds a {type(value).__name__} as {column}, not text: make it a string")
        elif not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise DataError(f"{where} has half a surrogate pair in its {column}, which is no character: remove it")
    return values


def _frames(values: Iterator[dict[str, str]], rows: int) -> Iterator[pl.DataFrame]:
    while batch := list(islice(values, rows)):
        yield pl.DataFrame(batch, schema=dict.fromkeys(COLUMNS, pl.String))

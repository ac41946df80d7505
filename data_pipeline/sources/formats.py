"""The kinds of files that can be read, by suffix. To add one, write its two functions and name them here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from data_pipeline.sources.arrow import arrow_chunks, arrow_columns
from data_pipeline.sources.chunk import Chunk
from data_pipeline.sources.compression import COMPRESSIONS
from data_pipeline.sources.delimited import delimited_chunks, delimited_columns
from data_pipeline.sources.json_array import json_chunks, json_columns
from data_pipeline.sources.jsonl import jsonl_chunks, jsonl_columns
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.parquet import parquet_chunks, parquet_columns
from data_pipeline.sources.tar_samples import tar_chunks, tar_columns


@dataclass(frozen=True)
class Format:
    """A kind of file.

    columns: return the names of a file's columns, or None if it has no row to tell them.
    chunks: divide a file into chunks. Both raise DataError if the file is damaged.
    """

    columns: Callable[[Path], list[str] | None]
    chunks: Callable[[Path, Layout], Sequence[Chunk]]


JSONL, DELIMITED = Format(jsonl_columns, jsonl_chunks), Format(delimited_columns, delimited_chunks)
ARROW = Format(arrow_columns, arrow_chunks)
TEXT_FORMATS = {
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".json": Format(json_columns, json_chunks),
    ".csv": DELIMITED,
    ".tsv": DELIMITED,
}
FORMATS = {
    ".parquet": Format(parquet_columns, parquet_chunks),
    ".arrow": ARROW,
    ".feather": ARROW,
    ".ipc": ARROW,
    ".tar": Format(tar_columns, tar_chunks),
    **TEXT_FORMATS,
    **{suffix + compression: kind for suffix, kind in TEXT_FORMATS.items() for compression in COMPRESSIONS},
}
NAMED = f"{', '.join(suffix for suffix in FORMATS if suffix.count('.') == 1)} (text also as {', '.join(COMPRESSIONS)})"


def format_of(file: PurePath) -> Format | None:
    """Return the format of a file, or None if its suffix is not known."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return FORMATS.get("".join(suffixes[-2:])) or FORMATS.get("".join(suffixes[-1:]))

"""Stage 3 of a preparation: pack the kept rows of a group of chunks, and write them as shards."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.preparation.job import FATE, Job, Seconds
from data_pipeline.preparation.scratch import from_bytes, load_arrays, stamp, work_folder, write_scratch
from data_pipeline.preparation.select_rows import Group, Selection, load_selection, selection_file
from data_pipeline.shards.format import TOKENIZER_FOLDER, VALIDATION_FOLDER, write_shard
from data_pipeline.shards.packing import Documents, PackedRows, pack
from data_pipeline.tokens.encoding import DocumentEncoder

ENCODED = ("ids", "length", "turns", "turn_length", "answer_start", "source", "source_list", "origin", "copy")


def group_files(out: Path, selection: Selection) -> list[Path]:
    """Return the paths of the JSON files, one per group, with the index entries and counts of what stage 3 wrote."""
    return [work_folder(out) / f"{group.split}-{group.number:05d}.json" for group in selection.groups]


def folder_of(out: Path, split: str) -> Path:
    """Return the shard folder of a split."""
    return out if split == "training" else out / VALIDATION_FOLDER


def write_group(job: Job, number: int) -> dict:
    """Write the shards of one group, and return its number of rows and seconds."""
    selection, seconds = _selection(job.out, stamp(selection_file(job.out))), Seconds()
    group = selection.groups[number]
    with seconds.of("load"):
        documents = _documents(job, selection, group)
    encoder = _encoder(job.out / TOKENIZER_FOLDER, stamp(job.out / TOKENIZER_FOLDER))
    with seconds.of("pack"):
        rows = pack(documents, job.settings.seq_len, encoder.pad_token_id, encoder.dtype)
    folder, step = folder_of(job.out, group.split), job.settings.rows_per_shard
    folder.mkdir(exist_ok=True)
    with seconds.of("write"):
        files = [
            write_shard(folder, f"shard-{group.number:05d}-{first // step:03d}", _part(rows, first, first + step))
            for first in range(0, len(rows.tokens), step)
        ]
    written = {"files": files, "documents": len(documents.input_rows), "tokens": len(documents.ids)}
    write_scratch(group_files(job.out, selection)[number], json.dumps(written).encode())
    return {"rows": len(documents.input_rows), "seconds": dict(seconds)}


def _documents(job: Job, selection: Selection, group: Group) -> Documents:
    numbers = {name: number for number, name in enumerate(selection.sources)}
    parts = []
    for chunk in group.chunks:
        arrays = load_arrays(job.chunk_file(chunk), *ENCODED)
        rows = selection.chunk(chunk)
        kept = selection.fate[rows] == FATE[group.split]
        in_kept = np.repeat(kept, arrays["turns"])
        parts.append(
            Documents(
                arrays["ids"][np.repeat(kept, arrays["length"])],
                arrays["turn_length"][in_kept],
                arrays["answer_start"][in_kept],
                np.array([numbers.get(name, -1) for name in from_bytes(arrays["source_list"])], dtype=np.int64)[
                    arrays["source"][kept]
                ],
                selection.input_rows(chunk, arrays["origin"], arrays["copy"])[kept],
                arrays["turns"][kept],
            )
        )
    return Documents(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Documents)))


def _part(rows: PackedRows, first: int, end: int) -> PackedRows:
    spans_before = np.cumsum([0, *rows.pieces])
    pieces = rows.pieces[first:end]
    begin = int(spans_before[first])
    return PackedRows(rows.tokens[first:end], rows.spans[begin : begin + int(pieces.sum())], pieces)


@lru_cache(maxsize=1)
def _selection(out: Path, stamp: int) -> Selection:
    return load_selection(out)


@lru_cache(maxsize=1)
def _encoder(folder: Path, stamp: int) -> DocumentEncoder:
    return DocumentEncoder(folder, fast=False)

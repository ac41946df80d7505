"""Stage 2 of a preparation: decide over all chunks which rows stay, and which chunks are packed together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.deduplication.keys import repeated
from data_pipeline.deduplication.near_duplicates import NearDuplicateSettings, duplicates
from data_pipeline.preparation.encode_chunks import signature_file
from data_pipeline.preparation.job import FATE, FIRST_REASON, Job
from data_pipeline.preparation.scratch import as_bytes, from_bytes, load_arrays, map_array, save_arrays, work_folder
from data_pipeline.preparation.select_copies import select_copies
from data_pipeline.shards.packing import FIRST_COPY

SPLITS = ("validation", "training")  # validation first: the folder is complete once training is
# A group ends with the chunk that reaches either limit; the limit on tokens bounds the memory of packing.
ROWS_PER_GROUP = 65536
TOKENS_PER_GROUP = 2**26


@dataclass(frozen=True)
class Group:
    """Chunks whose rows of one split are packed together; `number` counts within the split."""

    split: str
    number: int
    chunks: range
    rows: int


@dataclass(frozen=True)
class Selection:
    """The fate of every row, the names of the sources, and the groups.

    fate: uint8 `[rows]`, indices into FATES. Copies are rows here.
    first_rows: int64 `[chunks + 1]`, the first row of each chunk, and the number of rows at the end.
    first_inputs: int64 `[chunks + 1]`, the same without copies.
    sources: names, in the order in which they first appear among the kept rows.
    unknown_sources: names in the settings that no row has.
    """

    fate: np.ndarray
    first_rows: np.ndarray
    first_inputs: np.ndarray
    sources: list[str]
    unknown_sources: list[str]
    groups: list[Group]

    def chunk(self, number: int) -> slice:
        """Return the rows of a chunk."""
        return slice(int(self.first_rows[number]), int(self.first_rows[number + 1]))

    @property
    def num_inputs(self) -> int:
        """The number of rows that were read."""
        return int(self.first_inputs[-1])

    @property
    def num_copies(self) -> int:
        """The number of copies that augmentations made."""
        return len(self.fate) - self.num_inputs

    def input_rows(self, chunk: int, origin: np.ndarray, copy: np.ndarray) -> np.ndarray:
        """Return the numbers that the rows of a chunk have in spans, int64 `[rows]`; origin, copy: as in the chunk."""
        in_chunk = np.cumsum(copy == 0) - 1
        return self.first_inputs[chunk] + in_chunk[origin] + copy.astype(np.int64) * FIRST_COPY


def selection_file(out: Path) -> Path:
    """Return the path of the result of stage 2."""
    return work_folder(out) / "selection.npz"


def select_rows(job: Job) -> None:
    """Drop rows that repeat an earlier one, and divide the others between training and validation.

    Needs memory for the arrays of one chunk and about 60 bytes per row.
    """
    names = ("fate", "key", "opening_key", "length", "origin", "copy")
    columns = [load_arrays(path, *names) for path in job.chunk_files()]
    first_rows = np.cumsum([0, *(len(column["fate"]) for column in columns)])
    fate = np.concatenate([column.pop("fate") for column in columns])
    keys = np.concatenate([column.pop("key") for column in columns])
    openings = np.concatenate([column.pop("opening_key") for column in columns])
    lengths = np.concatenate([column.pop("length") for column in columns]).astype(np.int64)
    copies = np.flatnonzero(np.concatenate([column["copy"] for column in columns]))
    origins = np.concatenate([column.pop("origin") + first for column, first in zip(columns, first_rows, strict=False)])
    inputs = [int(np.count_nonzero(column.pop("copy") == 0)) for column in columns]
    is_copy = np.zeros(len(fate), dtype=bool)
    is_copy[copies] = True
    fate[repeated(keys, (fate == 0) & ~is_copy)] = FATE["duplicate"]
    if job.settings.near_duplicates is not None:
        found = [map_array(signature_file(path), path) for path in job.chunk_files()]
        settings = NearDuplicateSettings(job.settings.near_duplicates)
        fate[duplicates(found, (fate == 0) & ~is_copy, settings)] = FATE["near_duplicate"]
    # The hash of the first prompt alone decides, so no prompt is in both splits, whatever the rest of the corpus is.
    below = openings < np.uint64(int(job.settings.validation_share * 2**64))
    fate[(fate == 0) & below & ~is_copy] = FATE["validation"]
    if len(copies):
        select_copies(fate, copies, origins[copies], below, keys)
    kept, every = _source_names(job, fate, first_rows)
    unknown = sorted({*job.settings.sources, *job.settings.exclude_sources} - every)
    arrays = {
        "fate": fate,
        "first_rows": first_rows,
        "first_inputs": np.cumsum([0, *inputs]),
        "sources": as_bytes(kept),
        "unknown_sources": as_bytes(unknown),
        "groups": np.array([group for split in SPLITS for group in _groups(split, fate, lengths, first_rows)]).reshape(
            -1, 4
        ),
    }
    save_arrays(selection_file(job.out), arrays)


def load_selection(out: Path) -> Selection:
    """Read the result of stage 2."""
    arrays = load_arrays(selection_file(out))
    counts = dict.fromkeys(SPLITS, 0)
    groups = []
    for number, first, end, rows in arrays["groups"].tolist():
        split = SPLITS[number]
        groups.append(Group(split, counts[split], range(first, end), rows))
        counts[split] += 1
    return Selection(
        arrays["fate"],
        arrays["first_rows"],
        arrays["first_inputs"],
        from_bytes(arrays["sources"]),
        from_bytes(arrays["unknown_sources"]),
        groups,
    )


def _groups(
    split: str, fate: np.ndarray, lengths: np.ndarray, first_rows: np.ndarray
) -> list[tuple[int, int, int, int]]:
    """Divide the chunks into groups: the index of the split, first chunk, one past the last chunk, rows of each."""
    groups, first, rows, tokens = [], 0, 0, 0
    for chunk, (start, end) in enumerate(pairwise(first_rows)):
        mine = fate[start:end] == FATE[split]
        rows += int(np.count_nonzero(mine))
        tokens += int(lengths[start:end][mine].sum())
        if rows >= ROWS_PER_GROUP or tokens >= TOKENS_PER_GROUP:
            groups.append((SPLITS.index(split), first, chunk + 1, rows))
            first, rows, tokens = chunk + 1, 0, 0
    return [*groups, (SPLITS.index(split), first, len(first_rows) - 1, rows)] if rows else groups


def _source_names(job: Job, fate: np.ndarray, first_rows: np.ndarray) -> tuple[list[str], set[str]]:
    """Return the source names of the kept rows in order of appearance, and the source names of all rows."""
    kept: dict[str, None] = {}
    every: set[str] = set()
    for path, (start, end) in zip(job.chunk_files(), pairwise(first_rows), strict=True):
        arrays = load_arrays(path, "source", "source_list")
        names = from_bytes(arrays["source_list"])
        every |= {names[number] for number in np.unique(arrays["source"])}
        numbers, first = np.unique(arrays["source"][fate[start:end] < FIRST_REASON], return_index=True)
        kept |= dict.fromkeys(names[number] for number in numbers[np.argsort(first)])
    return list(kept), every

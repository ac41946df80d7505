"""Stage 2 of a preparation: which rows stay, seen over all chunks, and which chunks are packed together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.deduplication.keys import repeated
from data_pipeline.deduplication.near_duplicates import NearDuplicateSettings, duplicates
from data_pipeline.preparation.encode_chunks import signature_file
from data_pipeline.preparation.job import FATE, FIRST_REASON, Job
from data_pipeline.preparation.scratch import as_texts, load_arrays, map_array, save_arrays, work_folder

SPLITS = ("validation", "training")  # validation first: the folder is complete once training is
ROWS_PER_GROUP = 65536  # a group ends with the chunk that reaches this many,
TOKENS_PER_GROUP = 2**26  # or this many, which bounds the memory of packing


@dataclass(frozen=True)
class Group:
    """Chunks whose rows of one split are packed together; `number` counts within the split."""

    split: str
    number: int
    chunks: range
    rows: int


@dataclass(frozen=True)
class Selection:
    """What became of every row of the source, the numbers of its sources, and the groups.

    fate: uint8 `[rows]`, indices into FATES. first_rows: int64 `[chunks + 1]`. sources: names, in the order in which
    they appear among kept rows. unknown_sources: those that the settings name and no row has.
    """

    fate: np.ndarray
    first_rows: np.ndarray
    sources: list[str]
    unknown_sources: list[str]
    groups: list[Group]

    def chunk(self, number: int) -> slice:
        """The rows of a chunk."""
        return slice(int(self.first_rows[number]), int(self.first_rows[number + 1]))


def selection_file(out: Path) -> Path:
    """Where stage 2 leaves what it found."""
    return work_folder(out) / "selection.npz"


def select_rows(job: Job) -> None:
    """Find what repeats an earlier row, and divide the others between training and validation.

    Beside the arrays of one chunk it holds about 60 bytes a row.
    """
    columns = [load_arrays(path, "fate", "key", "question_key", "length") for path in job.chunk_files()]
    first_rows = np.cumsum([0, *(len(column["fate"]) for column in columns)])
    fate = np.concatenate([column.pop("fate") for column in columns])
    keys = np.concatenate([column.pop("key") for column in columns])
    questions = np.concatenate([column.pop("question_key") for column in columns])
    lengths = np.concatenate([column.pop("length") for column in columns]).astype(np.int64)
    fate[repeated(keys, fate == 0)] = FATE["duplicate"]
    del keys
    if job.settings.near_duplicates is not None:
        found = [map_array(signature_file(path), path) for path in job.chunk_files()]
        settings = NearDuplicateSettings(job.settings.near_duplicates)
        fate[duplicates(found, fate == 0, settings)] = FATE["near_duplicate"]
    # By the question's hash, so that no question is in both, whatever else the corpus holds and in what order.
    below = questions < np.uint64(int(job.settings.validation_share * 2**64))
    fate[(fate == 0) & below] = FATE["validation"]
    kept, every = _source_names(job, fate, first_rows)
    unknown = sorted({*job.settings.sources, *job.settings.exclude_sources} - every)
    arrays = {
        "fate": fate,
        "first_rows": first_rows,
        "sources": np.array(kept, dtype=np.str_),
        "unknown_sources": np.array(unknown, dtype=np.str_),
        "groups": np.array([group for split in SPLITS for group in _groups(split, fate, lengths, first_rows)]).reshape(
            -1, 4
        ),
    }
    save_arrays(selection_file(job.out), arrays)


def load_selection(out: Path) -> Selection:
    """Read what stage 2 found."""
    arrays = load_arrays(selection_file(out))
    counts = dict.fromkeys(SPLITS, 0)
    groups = []
    for number, first, end, rows in arrays["groups"].tolist():
        split = SPLITS[number]
        groups.append(Group(split, counts[split], range(first, end), rows))
        counts[split] += 1
    return Selection(
        arrays["fate"], arrays["first_rows"], arrays["sources"].tolist(), arrays["unknown_sources"].tolist(), groups
    )


def _groups(
    split: str, fate: np.ndarray, lengths: np.ndarray, first_rows: np.ndarray
) -> list[tuple[int, int, int, int]]:
    """Runs of chunks that make a group of a split: its number, the first chunk, the one behind the last, rows."""
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
    """The names of the kept rows' sources, in the order of appearance, and those of all rows."""
    kept: dict[str, None] = {}
    every: set[str] = set()
    for path, (start, end) in zip(job.chunk_files(), pairwise(first_rows), strict=True):
        arrays = load_arrays(path, "source", "source_list")
        names = as_texts(arrays["source_list"])
        every |= {names[number] for number in np.unique(arrays["source"])}
        numbers, first = np.unique(arrays["source"][fate[start:end] < FIRST_REASON], return_index=True)
        kept |= dict.fromkeys(names[number] for number in numbers[np.argsort(first)])
    return list(kept), every

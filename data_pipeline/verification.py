"""Proving that a shard folder is what its index says."""

import hashlib
import os
from collections.abc import Callable

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.reader import ShardFolder
from data_pipeline.shards import files_of


def verify(path: str | os.PathLike, progress: Callable[[int], None] | None = None) -> dict:
    """Rehashes every file of a shard folder and recounts its rows, documents and tokens; returns the index.

    progress: called with the number of bytes of each file once it is checked. Raises DataError naming the bad file.
    """
    folder = ShardFolder(path)
    for entry in files_of(folder.index):
        with (folder.path / entry["name"]).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise DataError(f"{folder.path / entry['name']} has changed since it was written: copy or prepare it again")
        if progress:
            progress(entry["bytes"])
    counted = {"packed_rows": 0, "documents": 0, "tokens": 0}
    for row in range(folder.num_rows):
        tokens, spans = folder.read(row)
        _check_row(folder, row, tokens, spans)
        counted["packed_rows"] += 1
        counted["documents"] += int((spans[:, 5] == 0).sum())
        counted["tokens"] += int(spans[-1, 2])
    counts = folder.index["counts"]
    for name, number in counted.items():
        if counts[name] != number:
            raise DataError(f"{folder.path} holds {number} {name} and its index says {counts[name]}: prepare it again")
    return folder.index


def _check_row(folder: ShardFolder, row: int, tokens: np.ndarray, spans: np.ndarray) -> None:
    starts, answers, ends = spans[:, 0], spans[:, 1], spans[:, 2]
    sound = (
        tokens.shape == (folder.seq_len,)
        and len(spans) > 0
        and starts[0] == 0
        and np.array_equal(starts[1:], ends[:-1])
        and ends[-1] <= folder.seq_len
        and bool(np.all((starts <= answers) & (answers <= ends) & (starts < ends)))
        and bool(np.all(tokens[ends[-1] :] == folder.pad_token_id))
        and int(tokens.max()) < folder.vocab_size
    )
    if not sound:
        raise DataError(f"row {row} of {folder.path} breaks the format of shards: prepare the folder again")

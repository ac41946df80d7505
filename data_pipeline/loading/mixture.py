"""A weighted mixture of several shard folders."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.loading.order import MIXTURE_BLOCK, MixtureOrder, quotas_of
from data_pipeline.loading.reader import OpenShard, RowReader, ShardFolder
from data_pipeline.loading.remote import ShardCache
from data_pipeline.shards.packing import SPAN_COLUMNS, PackedRows

SOURCE = SPAN_COLUMNS.index("source")


def open_data(
    data: str | os.PathLike | Sequence[dict], on_bad_shard: str = "refuse", cache: ShardCache | None = None
) -> RowReader:
    """Open the data of a run: the path or URL of a folder, or a list of `{"path": ..., "weight": ...}` for several.

    Raises DataError if a folder cannot be opened, or if the folders do not fit together.
    """
    if isinstance(data, str | os.PathLike):
        return ShardFolder(data, on_bad_shard, cache)
    folders = [ShardFolder(entry["path"], on_bad_shard, cache) for entry in data]
    _check_weights(folders, [entry["weight"] for entry in data])
    # A mixture of one folder is that folder, so its checkpoints can be resumed with `data` as a path, and vice versa.
    return folders[0] if len(folders) == 1 else Mixture(folders, [entry["weight"] for entry in data])


class Mixture(RowReader):
    """Shard folders with the same tokenizer and row length; their weights give their shares of the rows.

    weights: any positive numbers. A folder's share is its weight divided by the sum of all, rounded to 0.01 %. Each folder
    repeats at the end of its own epoch.
    sources: the source names of all folders without repetition.
    bad_shards: the error message for each bad shard, by its number in the mixture.
    Raises DataError if the folders do not fit together, or if a weight is invalid.
    """

    def __init__(self, folders: Sequence[ShardFolder], weights: Sequence[float]) -> None:
        _check_weights(folders, weights)
        first = folders[0]
        for other in folders[1:]:
            _check_together(first, other)
        self.folders = list(folders)
        self.location = " + ".join(folder.location for folder in folders)
        self.quotas = quotas_of(weights)
        for folder, quota in zip(folders, self.quotas, strict=True):
            if quota == 0:
                raise DataError(
                    f"the weight of {folder.location} is below 1 in {MIXTURE_BLOCK} of the mixture: raise it, or leave the "
                    "folder out"
                )
        self.seq_len, self.vocab_size, self.pad_token_id = first.seq_len, first.vocab_size, first.pad_token_id
        self.tokenizer_fingerprint = first.tokenizer_fingerprint
        self.sources = list(dict.fromkeys(name for folder in folders for name in folder.sources))
        self.num_rows = sum(folder.num_rows for folder in folders)
        self.fingerprint = _mixture_fingerprint(folders, self.quotas)
        self._first_rows = np.cumsum([0, *(rows for folder in folders for rows in folder.rows_per_file)])
        self._first_shards = np.cumsum([0, *(len(folder.rows_per_file) for folder in folders)])
        self._first_rows_of_folders = self._first_rows[self._first_shards]
        # Line f of this table maps the source indices of folder f to the mixture's.
        self._source_table = np.zeros((len(folders), max(len(folder.sources) for folder in folders)), dtype=np.int64)
        for line, folder in zip(self._source_table, folders, strict=True):
            line[: len(folder.sources)] = [self.sources.index(name) for name in folder.sources]

    @property
    def tokenizer_path(self) -> Path:
        return self.folders[0].tokenizer_path

    @property
    def bad_shards(self) -> dict[int, str]:
        starts = zip(self._first_shards.tolist(), self.folders, strict=False)
        return {start + shard: fault for start, folder in starts for shard, fault in folder.bad_shards.items()}

    def order(self, seed: int) -> MixtureOrder:
        return MixtureOrder([folder.order(seed) for folder in self.folders], self.quotas, self.fingerprint, seed)

    def open_shard(self, shard: int) -> OpenShard | None:
        folder = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        return self.folders[folder].open_shard(shard - int(self._first_shards[folder]))

    def look_ahead(self, shards: Iterable[int]) -> None:
        shards = np.fromiter(shards, dtype=np.int64)
        for folder, start, end in zip(self.folders, self._first_shards[:-1], self._first_shards[1:], strict=True):
            folder.look_ahead((shards[(start <= shards) & (shards < end)] - start).tolist())

    def gather(self, rows: np.ndarray) -> PackedRows:
        """Read rows like `RowReader.gather`, with the sources in the spans as indices into the mixture's names."""
        read = super().gather(rows)
        folders = np.searchsorted(self._first_rows_of_folders, rows, side="right") - 1
        spans = read.spans.copy()
        spans[:, SOURCE] = self._source_table[np.repeat(folders, read.pieces), spans[:, SOURCE]]
        return PackedRows(read.tokens, spans, read.pieces)


def _check_weights(folders: Sequence[ShardFolder], weights: Sequence[float]) -> None:
    if not folders:
        raise DataError("data is an empty list: give at least one folder and its weight")
    for folder, weight in zip(folders, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise DataError(
                f"the weight of {folder.location} is {weight}: give a number above 0, or leave the folder out"
            )


def _check_together(first: ShardFolder, other: ShardFolder) -> None:
    for what in ("seq_len", "tokenizer_fingerprint"):
        values = [getattr(folder, what) for folder in (first, other)]
        if values[0] != values[1]:
            raise DataError(
                f"{first.location} and {other.location} do not fit together, their {what} is {values[0]} and {values[1]}: "
                "prepare one of them again with the value of the other"
            )


def _mixture_fingerprint(folders: Sequence[ShardFolder], quotas: Sequence[int]) -> str:
    fingerprints = [folder.fingerprint for folder in folders]
    for index, fingerprint in enumerate(fingerprints):
        if fingerprint in fingerprints[:index]:
            raise DataError(
                f"{folders[index].location} has the same rows as another folder of the mixture: give it only once"
            )
    parts = [f"{fingerprint} {quota}" for fingerprint, quota in zip(fingerprints, quotas, strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()

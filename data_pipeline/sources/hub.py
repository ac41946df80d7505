"""Chunks of a dataset on the Hugging Face hub: each of its files is one, and is streamed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.layouts import Layout
from data_pipeline.sources.rows import Row, columns_of, frames

if TYPE_CHECKING:
    import datasets

WAITS = (1, 5, 30, 120)  # seconds before each further attempt; `datasets` itself retries single reads


@dataclass(frozen=True)
class HubChunk:
    """File number `index` of the `count` files of a split."""

    name: str
    split: str
    revision: str | None
    index: int
    count: int
    rows: None = None  # unknown until it is read

    def frames(self, layout: Layout, bad_rows: BadRows) -> Iterator[pl.DataFrame]:
        """Yield the file's rows. After a network fault, reading resumes at the row where it stopped."""
        given = 0
        for wait in (*WAITS, None):
            try:
                for frame in frames(self._rows(given, layout), layout, self.name, bad_rows):
                    given += len(frame)
                    yield frame
                return
            except _network_faults() as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                where = f"file {self.index + 1} of {self.count} of the hub dataset {self.name!r}"
                if wait is None:
                    raise DataError(
                        f"{where} stopped after {given:,} rows: check the network and run again ({reason})"
                    ) from error
                print(f"{where} stopped after {given:,} rows ({reason}); retrying in {wait} s", file=sys.stderr)
                time.sleep(wait)

    def _rows(self, skip: int, layout: Layout) -> Iterator[Row]:
        part = _open(self.name, self.revision, self.split).shard(num_shards=self.count, index=self.index).skip(skip)
        if part.column_names is not None:
            part = part.select_columns(columns_of(layout, part.column_names))
        for number, row in enumerate(part, skip):
            yield row, partial("row {} of file {} of the hub dataset {!r}".format, number, self.index, self.name)


def hub_chunks(name: str, choice: LayoutChoice, split: str = "train") -> tuple[dict, tuple[HubChunk, ...], Layout]:
    """Return the identity of the dataset, which is its name and revision, its chunks and its layout.

    Raises DataError if there is no such dataset, or if required columns are missing.
    """
    import datasets

    try:
        revision = _newest_revision(name)
        dataset = _open(name, revision, split)
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError, *_network_faults()) as error:
        raise DataError(
            f"the source {name!r} is neither a path here nor a reachable hub dataset with a `{split}` split: "
            f"check the spelling, or the network ({str(error).strip().splitlines()[0]})"
        ) from error
    columns = dataset.column_names or list(next(iter(dataset), {}))
    layout = choice.resolve(columns, f"the hub dataset {name!r}")
    count = dataset.num_shards
    identity = {"name": name, "split": split} | ({"revision": revision} if revision else {})
    return identity, tuple(HubChunk(name, split, revision, index, count) for index in range(count)), layout


def _newest_revision(name: str) -> str | None:
    """Return the current commit, so that a job that resumes tomorrow reads the same data; None for a local folder."""
    if Path(name).exists():
        return None
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name).sha


@lru_cache(maxsize=1)
def _open(name: str, revision: str | None, split: str) -> datasets.IterableDataset:
    import datasets

    return datasets.load_dataset(name, split=split, streaming=True, revision=revision)


def _network_faults() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's error derives from the error of its HTTP client, which differs between versions, and from OSError.
    return HfHubHTTPError.__bases__

"""The rows that a run trains on: one shard folder, or several with weights, on local disks or behind URLs."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from data_pipeline.loading.mixture import open_data
from data_pipeline.loading.remote import ShardCache, default_cache_folder, is_remote
from data_pipeline.loading.row_reader import RowReader
from data_pipeline.shards.format import INDEX_NAME, VALIDATION_FOLDER
from launcher.config import DataCache, Prepare, RunConfig


def open_run_data(config: RunConfig) -> RowReader:
    """Open the run's `data`.

    Raises `DataError` if a folder cannot be opened, or the folders of a mixture do not fit together.
    """
    data = config.data if isinstance(config.data, str) else [asdict(weighted) for weighted in config.data]
    return open_data(data, config.on_bad_shard, shard_cache(config.data_cache))


def to_prepare(config: RunConfig) -> tuple[Prepare, str] | None:
    """Return how a start prepares the data, and the folder; None without `prepare`, or if the folder is finished."""
    if config.prepare is None or not isinstance(config.data, str) or is_remote(config.data):
        return None
    return None if Path(config.data, INDEX_NAME).exists() else (config.prepare, config.data)


def held_out_location(data: str | list, validation_data: str | None) -> str | None:
    """Return where a run's held-out rows are: `validation_data`, or the rows that `lfm prepare` held out of `data`.

    None if there are none.
    """
    if validation_data is not None:
        return validation_data
    # Looking for a validation folder behind a URL would be slow, so `validation_data` must name it.
    if not isinstance(data, str) or is_remote(data) or not Path(data, VALIDATION_FOLDER).is_dir():
        return None
    return str(Path(data, VALIDATION_FOLDER))


def shard_cache(wanted: DataCache) -> ShardCache:
    """Create the cache of a run; variables such as `$SLURM_TMPDIR` are expanded on each machine."""
    folder = wanted.folder
    return ShardCache(
        Path(os.path.expandvars(folder)).expanduser() if folder else default_cache_folder(),
        round(wanted.gigabytes * 1e9),
    )

"""The data of real training runs: mixtures, bad shards, and batches that are read ahead."""

import statistics

import pytest

from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from launcher.config import WeightedData
from launcher.config_file import load_run_config
from launcher.errors import ConfigurationError
from launcher.training.checkpoints.checkpoint import read_manifest
from launcher.training.setup.data_source import open_run_data


@pytest.fixture(scope="module")
def mixture(trainer, sample_data):
    """The sample, and the sample again in small shards, one of which has a flipped bit."""
    damaged = trainer.folder / "damaged"
    prepare(
        "sample",
        damaged,
        Settings(tokenizer=str(sample_data / "tokenizer"), seq_len=64, rows_per_shard=400),
        progress=False,
    )
    name = ShardFolder(damaged).index["files"][1]["name"]
    content = bytearray((damaged / name).read_bytes())
    content[1000] ^= 1
    (damaged / name).write_bytes(bytes(content))
    return f"data=[{{path: '{sample_data}', weight: 1}}, {{path: '{damaged}', weight: 3}}]"


def test_a_mixture_trains_and_resumes_with_its_bad_shard_skipped_on_all_ranks(trainer, mixture):
    def arguments(output, steps):
        return trainer.arguments(output, mixture, "on_bad_shard=skip", f"max_steps={steps}", "checkpoint_every=4",
                                 "schedule.steps=8", "global_batch_rows=8")  # fmt: skip

    trainer.run(2, arguments("whole", 8), arguments("halves", 4), arguments("halves", 8))
    whole, halves = trainer.scalars("whole"), trainer.scalars("halves")
    assert halves["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-5)
    assert halves["data/bad_shard_rows"] == whole["data/bad_shard_rows"]
    # The ranks count as many bad rows as one process finds in the same batches.
    config = load_run_config(trainer.config, [mixture, "on_bad_shard=skip"])
    data = open_run_data(config)
    assert read_manifest(trainer.folder / "whole/checkpoints/step-00000008")["data_fingerprint"] == data.fingerprint
    stream = BatchStream(data, seed=config.seed, global_batch_rows=8, micro_batch_rows=8, rank=0, world_size=1)
    for step in range(1, 9):
        (batch,) = stream.next_step()
        bad_rows = int((batch["input_ids"] == data.pad_token_id).all(dim=1).sum())
        assert whole["data/bad_shard_rows"][step] == bad_rows
    assert sum(whole["data/bad_shard_rows"].values()) > 0
    # The first step of a start waits for its batch; the later batches are read ahead.
    waited, took = (list(whole[tag].values())[1:] for tag in ("perf/data_seconds", "perf/step_seconds"))
    # The median, because a busy machine may delay one of the steps.
    assert statistics.median(wait / step for wait, step in zip(waited, took, strict=True)) < 0.01


def test_data_is_a_path_or_a_list_of_weighted_paths(trainer):
    config = load_run_config(trainer.config, ["data=[{path: a, weight: 1}, {path: 's3://b/c', weight: 0.5}]"])
    assert config.data == [WeightedData("a", 1.0), WeightedData("s3://b/c", 0.5)]
    assert load_run_config(trainer.config, ["data=a"]).data == "a"
    for wrong, fault in (
        ("data=[{path: a}]", r"data\[0\].weight is missing"),
        ("data=[{path: a, weight: 1, share: 2}]", r"unknown key data\[0\].share"),
        ("data=[a]", r"data\[0\] in .* is a section of keys"),
        ("on_bad_shard=ignore", "on_bad_shard is 'ignore'; it must be 'refuse' or 'skip'"),
        ("data_cache.gigabytes=0", "data_cache.gigabytes is 0; it must be above 0"),
    ):
        with pytest.raises(ConfigurationError, match=fault):
            load_run_config(trainer.config, [wrong])

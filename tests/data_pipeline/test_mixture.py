import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import BatchStream, ValidationBatches
from data_pipeline.loading.mixture import Mixture, open_data
from data_pipeline.loading.reader import ShardFolder
from tests.data_pipeline.shard_folders import FIRST_ID, flip_bit, make_folder


@pytest.fixture
def folders(tmp_path):
    """67 rows of web and books, and 9 of code and web whose ids begin behind them."""
    first = make_folder(tmp_path / "first")
    return first, make_folder(tmp_path / "second", (5, 4), seed=1, sources=("code", "web"))


def weighted(folders, *weights):
    return [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=True)]


def test_a_mixture_reads_each_folder_with_its_own_sources(folders):
    data = open_data(weighted(folders, 1, 1))
    assert data.sources == ["web", "books", "code"]
    assert (data.num_rows, data.seq_len, data.pad_token_id) == (76, 32, 1)
    names = {0: ["web", "books"], 1: ["code", "web"]}
    read = data.gather(np.arange(76))
    spans = np.split(read.spans, np.cumsum(read.pieces)[:-1])
    for row in range(76):
        number, own_row = (0, row) if row < 67 else (1, row - 67)
        tokens, expected = ShardFolder(folders[number]).read(own_row)
        assert np.array_equal(read.tokens[row], tokens)
        assert np.array_equal(np.delete(spans[row], 3, axis=1), np.delete(expected, 3, axis=1))
        assert [data.sources[source] for source in spans[row][:, 3]] == [names[number][s] for s in expected[:, 3]]


def test_validation_tells_the_sources_of_a_mixture(folders):
    data = open_data(weighted(folders, 1, 1))
    seen = set()
    for batch in ValidationBatches(data, micro_batch_rows=16, rank=0, world_size=1):
        assert ((batch.sources == -1) == (batch.inputs["input_ids"] == data.pad_token_id)).all()
        seen |= set(batch.sources.unique().tolist())
    assert seen == {-1, 0, 1, 2}


def test_a_list_of_one_is_that_folder(folders):
    alone, listed = open_data(folders[0]), open_data(weighted(folders[:1], 3))
    assert listed.fingerprint == alone.fingerprint
    assert np.array_equal(listed.order(1).rows(np.arange(200)), alone.order(1).rows(np.arange(200)))


def test_the_fingerprint_is_of_the_folders_and_their_shares(folders):
    reference = open_data(weighted(folders, 3, 1)).fingerprint
    assert open_data(weighted(folders, 0.75, 0.25)).fingerprint == reference
    assert open_data(weighted(folders, 1, 1)).fingerprint != reference
    assert open_data(weighted(folders[::-1], 3, 1)).fingerprint != reference


def test_bad_shards_of_a_mixture_are_skipped(folders, capfd):
    flip_bit(folders[1] / "shard-00001.tar")
    data = open_data(weighted(folders, 1, 1), on_bad_shard="skip")
    stream = BatchStream(data, seed=0, global_batch_rows=40, micro_batch_rows=40, rank=0, world_size=1)
    bad_rows = sum(int((stream.next_step()[0]["input_ids"] == 1).all(dim=1).sum()) for _ in range(10))
    assert 60 < bad_rows < 120  # four ninths of half of 400 rows
    assert list(data.bad_shards) == [5]
    strict = BatchStream(
        open_data(weighted(folders, 1, 1)), seed=0, global_batch_rows=40, micro_batch_rows=40, rank=0, world_size=1
    )
    with pytest.raises(DataError, match="shard-00001.tar has changed"):
        strict.next_step()


def test_folders_that_do_not_go_together_are_told(folders, tmp_path):
    longer = make_folder(tmp_path / "longer", (3,), seq_len=64)
    other = make_folder(tmp_path / "other", (3,), tokenizer="another")
    with pytest.raises(DataError, match="first and .*longer do not fit together, their seq_len is 32 and 64"):
        open_data(weighted((folders[0], longer), 1, 1))
    with pytest.raises(DataError, match="their tokenizer_fingerprint is tokenizer and another"):
        open_data(weighted((folders[0], other), 1, 1))
    with pytest.raises(DataError, match="first has the same rows as another folder of the mixture"):
        open_data(weighted((folders[0], folders[0]), 1, 2))


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_a_weight_that_is_none_is_refused(folders, weight):
    with pytest.raises(DataError, match="the weight of .*second is"):
        open_data(weighted(folders, 1, weight))
    with pytest.raises(DataError, match="the weight of .*second is"):
        open_data(weighted(folders[1:], weight))


def test_a_weight_too_small_to_count_and_an_empty_list_are_refused(folders):
    with pytest.raises(DataError, match="the weight of .*second is below 1 in 10000"):
        open_data(weighted(folders, 1e6, 1))
    with pytest.raises(DataError, match="empty list"):
        Mixture([], [])


def test_rows_come_by_weight(folders):
    stream = BatchStream(
        open_data(weighted(folders, 9, 1)), seed=0, global_batch_rows=1000, micro_batch_rows=1000, rank=0, world_size=1
    )
    counts = np.zeros(2, dtype=int)
    for _ in range(10):
        (batch,) = stream.next_step()
        # Both folders number their rows from FIRST_ID; the second's are few, and their second tokens tell them apart.
        keys = {tuple(row) for row in ShardFolder(folders[1]).gather(np.arange(9)).tokens.tolist()}
        of_second = sum(tuple(row) in keys for row in batch["input_ids"].tolist())
        counts += (1000 - of_second, of_second)
        assert (batch["input_ids"][:, 0] >= FIRST_ID).all()
    assert counts.tolist() == [9000, 1000]

"""Bad shards, and what an index may not say; the rest of the reader is tested with the shards' format."""

import contextlib
import hashlib
import json
import os
import resource
import threading
import time

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import BatchStream, ValidationBatches
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.loading.row_reader import NO_ROW
from tests.data_pipeline.shard_folders import FIRST_ID, PAD, flip_bit, make_folder

NAMES = ("input_ids", "labels", "position_ids")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


def change_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def steps(data, count, rank=0, world_size=1):
    stream = BatchStream(data, seed=1, global_batch_rows=8, micro_batch_rows=2, rank=rank, world_size=world_size)
    return [stream.step_at(8 * step) for step in range(count)]


def bad_rows_of(step):
    return sum(int((batch["input_ids"] == PAD).all(dim=1).sum()) for batch in step)


def damage_tar(folder):
    flip_bit(folder / "shard-00001.tar")


def damage_offsets(folder):
    flip_bit(folder / "shard-00001.offsets.npy", -1)


def shorten(folder):
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])


def remove(folder):
    (folder / "shard-00001.tar").unlink()


DAMAGES = [damage_tar, damage_offsets, shorten, remove]


def test_rows_are_gathered_in_the_order_asked_for(folder):
    shards = ShardFolder(folder)
    rows = np.array([66, 0, NO_ROW, 40, 40, 19, 20])
    read = shards.gather(rows)
    spans = np.split(read.spans, np.cumsum(read.pieces)[:-1])
    for index, row in enumerate(rows):
        if row == NO_ROW:
            assert read.pieces[index] == 0 and (read.tokens[index] == PAD).all()
        else:
            tokens, expected = shards.read(row)
            assert np.array_equal(read.tokens[index], tokens) and np.array_equal(spans[index], expected)
    with pytest.raises(IndexError):
        shards.gather(np.array([67]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_refused_by_name(folder, damage):
    damage(folder)
    with pytest.raises(DataError, match=r"shard-00001\.(tar|offsets\.npy) (has|is missing)"):
        steps(ShardFolder(folder), 9)


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_of_a_skipped_shard_keep_their_positions_and_have_no_labels(folder, damage, capfd):
    whole = steps(ShardFolder(folder), 12)
    damage(folder)
    shards = ShardFolder(folder, on_bad_shard="skip")
    skipped = steps(shards, 12)
    bad_rows = 0
    for before, after in zip(whole, skipped, strict=True):
        bad_in_step = 0
        for batch, other in zip(before, after, strict=True):
            bad = ((batch["input_ids"][:, 0] - FIRST_ID) // 20 == 1).numpy()
            bad_in_step += bad.sum()
            assert all(batch[name][~bad].equal(other[name][~bad]) for name in NAMES)
            assert (other["labels"][bad] == -100).all() and (other["input_ids"][bad] == PAD).all()
            assert (other["position_ids"][bad] == np.arange(32)).all()
        assert bad_rows_of(after) == bad_in_step
        bad_rows += bad_in_step
    assert bad_rows >= 20
    assert list(shards.bad_shards) == [1]
    said = capfd.readouterr().err
    assert said.count("(on_bad_shard is skip): its 20 rows get no labels") == 1 and "shard-00001" in said


@pytest.mark.parametrize("opened", [True, False])
def test_a_shard_that_is_cut_while_it_is_read_is_found_and_does_not_kill_the_process(folder, opened):
    """Reading a mapped file behind its end is a SIGBUS."""
    rows = np.arange(20, 40)
    refusing, skipping = (ShardFolder(folder, on_bad_shard=how) for how in ("refuse", "skip"))
    for shards in (refusing, skipping):
        assert shards._is_good(1)
        if opened:
            shards.gather(rows)
    os.truncate(folder / "shard-00001.tar", 1000)
    with pytest.raises(DataError, match=r"shard-00001\.tar (has|was) .*1000 bytes"):
        refusing.gather(rows)
    assert (skipping.gather(rows).tokens == PAD).all() and list(skipping.bad_shards) == [1]
    assert len(skipping.gather(np.array([0])).spans)


def test_a_shard_that_was_whole_and_is_missing_when_it_is_opened_may_be_skipped(folder):
    shards = ShardFolder(folder, on_bad_shard="skip")
    assert shards._is_good(1)
    (folder / "shard-00001.tar").unlink()
    assert (shards.gather(np.arange(20, 40)).tokens == PAD).all()


def test_a_shard_that_cannot_be_read_is_skipped_by_whoever_looks_ahead_as_well(folder):
    shards = ShardFolder(folder, on_bad_shard="skip")
    tar = folder / "shard-00001.tar"
    tar.unlink()
    tar.mkdir()  # whoever runs the tests may read files of any permission
    shards.look_ahead([0, 1, 2])
    while shards._threads:
        time.sleep(0.01)
    assert list(shards.bad_shards) == [1] and "cannot be read (Is a directory)" in shards.bad_shards[1]
    assert shards.open_shard(1) is None and shards.open_shard(2) is not None


def test_too_many_open_files_are_no_fault_of_a_shard(folder):
    shards = ShardFolder(folder, on_bad_shard="skip")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    filled = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filled.append(os.dup(0))
        with pytest.raises(DataError, match=r"too many files are open; raise the limit \(ulimit -n\)"):
            shards.open_shard(1)
        shards.look_ahead([2])
        while shards._threads:
            time.sleep(0.01)
    finally:
        for descriptor in filled:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert shards.bad_shards == {} and shards.open_shard(1) is not None


def test_a_skipped_shard_is_the_same_for_every_rank(folder):
    damage_tar(folder)
    (alone,) = [steps(ShardFolder(folder, on_bad_shard="skip"), 9)]
    ranks = [steps(ShardFolder(folder, on_bad_shard="skip"), 9, rank, 4) for rank in range(4)]
    for step in range(9):
        together = [batch for rank in ranks for batch in rank[step]]
        assert sum(bad_rows_of(rank[step]) for rank in ranks) == bad_rows_of(alone[step])
        for batch, other in zip(alone[step], together, strict=True):
            assert all(batch[name].equal(other[name]) for name in NAMES)


def test_validation_skips_bad_shards_too(folder):
    damage_tar(folder)
    data = ShardFolder(folder, on_bad_shard="skip")
    batches = list(ValidationBatches(data, micro_batch_rows=10, rank=0, world_size=1))
    assert [bool((batch.inputs["labels"] == -100).all()) for batch in batches] == [False] * 2 + [True] * 2 + [False] * 3


def test_a_folder_of_nothing_but_bad_shards_is_refused(tmp_path):
    folder = make_folder(tmp_path / "folder", (5, 5))
    for shard in range(2):
        flip_bit(folder / f"shard-{shard:05d}.tar")
    with pytest.raises(DataError, match="every shard of .* is bad"):
        steps(ShardFolder(folder, on_bad_shard="skip"), 2)


def test_a_bad_tokenizer_is_never_skipped(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json has 2 bytes"):
        ShardFolder(folder, on_bad_shard="skip")


def test_an_unknown_way_with_bad_shards_is_one_sentence(folder):
    with pytest.raises(DataError, match="on_bad_shard is 'ignore': give one of refuse, skip"):
        ShardFolder(folder, on_bad_shard="ignore")


def test_a_shard_is_hashed_once_and_by_one_thread(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "data_pipeline.loading.reader.check_file", lambda file, name, entry: hashed.append(entry["name"])
    )
    data = ShardFolder(folder)
    threads = [threading.Thread(target=steps, args=(data, 20)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hashed) == sorted(
        f"shard-{shard:05d}.{kind}" for shard in range(4) for kind in ("tar", "offsets.npy")
    )


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "a/../../b.tar", ""])
@pytest.mark.parametrize("which", ["tar", "offsets", "tokenizer"])
def test_no_name_in_an_index_leads_outside_the_folder(folder, name, which):
    def change(index):
        shard = index["files"][2]
        entry = {"tar": shard, "offsets": shard["offsets"], "tokenizer": index["tokenizer"]["files"][0]}[which]
        entry["name"] = name

    change_index(folder, change)
    with pytest.raises(DataError, match="outside the folder"):
        ShardFolder(folder, on_bad_shard="skip")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("files"),
        lambda index: index["files"][0].pop("sha256"),
        lambda index: index["files"][0].update(sha256="../../../etc/passwd"),
        lambda index: index.update(seq_len="32"),
        lambda index: index["files"][1].update(rows=-1),
    ],
)
def test_a_damaged_index_is_one_sentence(folder, change):
    change_index(folder, change)
    with pytest.raises(DataError, match="the index of .* is damaged"):
        ShardFolder(folder)


def rehash(folder, shard=0):
    """Make the index agree with a shard that was changed."""

    def change(index):
        for entry in (index["files"][shard], index["files"][shard]["offsets"]):
            data = (folder / entry["name"]).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    change_index(folder, change)


@pytest.mark.parametrize(("what", "fault"), [(b"'<u2'", "is not 32 tokens"), (b"'<i8'", "pickled objects")])
def test_arrays_of_python_objects_are_not_read_even_where_the_hash_is_right(folder, what, fault):
    path = folder / "shard-00000.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(what, b"'|O' "[: len(what)]))
    rehash(folder)
    with pytest.raises(DataError, match=fault):
        steps(ShardFolder(folder), 9)


def test_offsets_that_lead_outside_their_shard_are_refused(folder):
    path = folder / "shard-00000.offsets.npy"
    offsets = np.load(path)
    offsets[3, 1] = 2**40
    np.save(path, offsets)
    rehash(folder)
    with pytest.raises(DataError, match="the offsets of .*shard-00000.tar do not fit it"):
        steps(ShardFolder(folder), 9)


def test_a_folder_without_rows_gives_no_batches(folder):
    change_index(folder, lambda index: index.update(files=[]))
    with pytest.raises(DataError, match="folder has no rows"):
        steps(ShardFolder(folder), 1)

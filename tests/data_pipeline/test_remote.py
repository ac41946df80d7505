"""Shards behind URLs: a bounded cache that many processes share, and stores that fail."""

import fcntl
import functools
import http.server
import json
import multiprocessing
import shutil
import threading
import time
from importlib.util import find_spec
from itertools import chain

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.mixture import open_data
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.loading.remote import ShardCache
from tests.data_pipeline.shard_folders import flip_bit, make_folder

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("data_pipeline.loading.remote.RETRY_SECONDS", (0.01, 0.01))


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder", (20,) * 12)


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 10**9)


def url_of(folder):
    return f"file://{folder}"


def digest(data, steps=40, rank=0, world_size=1):
    stream = BatchStream(data, seed=1, global_batch_rows=8, micro_batch_rows=2, rank=rank, world_size=world_size)
    return [[batch["labels"].sum().item() for batch in stream.next_step()] for _ in range(steps)]


def sizes_in(cache):
    return {path.name: path.stat().st_size for path in cache.files.iterdir()}


def test_a_remote_folder_gives_the_same_batches(folder, cache):
    remote = ShardFolder(url_of(folder), cache=cache)
    local = ShardFolder(folder)
    assert remote.fingerprint == local.fingerprint
    assert digest(remote) == digest(local)
    assert (remote.tokenizer_path / "tokenizer.json").read_bytes() == (folder / "tokenizer/tokenizer.json").read_bytes()
    assert all(np.array_equal(*pair) for pair in zip(remote.read(77), local.read(77), strict=True))


def test_a_store_in_memory_is_read(folder, cache):
    reference = digest(ShardFolder(folder))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/shards", recursive=True)
    assert digest(ShardFolder("memory://shards", cache=cache)) == reference
    memory.rm("/shards", recursive=True)
    assert digest(ShardFolder(url_of(folder), cache=cache)) == reference  # under another name, from the same cache


def test_a_store_behind_http_is_read(folder, cache):
    reference = digest(ShardFolder(folder))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert digest(ShardFolder(f"http://127.0.0.1:{server.server_port}", cache=cache)) == reference
        with pytest.raises(DataError, match="there is no finished shard folder at http://.*/nowhere"):
            ShardFolder(f"http://127.0.0.1:{server.server_port}/nowhere", cache=cache)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(DataError, match="cannot read http://127.0.0.1:.*/index.json .*: check the network"):
        ShardFolder(f"http://127.0.0.1:{server.server_port}", cache=cache)


def test_the_cache_stays_below_its_limit_and_drops_what_was_used_longest_ago(folder, tmp_path):
    index = ShardFolder(folder).index
    entries = index["files"]
    assert len({entry["bytes"] for entry in entries}) == 1
    size = entries[0]["bytes"]
    cache = ShardCache(tmp_path / "cache", 3 * size + 100)
    remote = ShardFolder(url_of(folder), cache=cache)._remote
    for shard in (0, 1, 2, 0, 3):
        time.sleep(0.02)  # the times of files tick every 4 to 10 ms on many kernels
        remote.open(entries[shard]).close()
        assert sum(sizes_in(cache).values()) <= cache.limit_bytes
    assert sizes_in(cache).keys() == {entries[shard]["sha256"] for shard in (0, 2, 3)}


def test_what_is_open_is_not_deleted_and_what_a_dead_process_left_is(folder, tmp_path):
    entries = ShardFolder(folder).index["files"]
    cache = ShardCache(tmp_path / "cache", 2 * entries[0]["bytes"] + 100)
    remote = ShardFolder(url_of(folder), cache=cache)
    held = remote.open_shard(0)
    left = cache.files / f"{'0' * 64}.{entries[0]['bytes']}.partial"
    left.write_bytes(b"half")
    for shard in range(1, 6):
        remote._remote.open(entries[shard]).close()
    assert sizes_in(cache).keys() == {entries[shard]["sha256"] for shard in (0, 5)}
    assert bytes(held.data[:10]) == b"shard-0000"


def test_a_shard_above_the_whole_limit_is_told(folder, tmp_path):
    remote = ShardFolder(url_of(folder), cache=ShardCache(tmp_path / "cache", 1000))
    with pytest.raises(DataError, match="does not fit into the shard cache .* whose limit is 1000"):
        digest(remote)


def test_many_processes_share_a_cache_that_holds_a_part_of_the_data(folder, tmp_path):
    """Each of four ranks reads all shards, through a cache of a third of them, and fetches and deletes as it goes."""
    index = ShardFolder(folder).index
    limit = 4 * index["files"][0]["bytes"] + 10_000
    reference = digest(ShardFolder(folder), 90)

    def work(rank, pipe):
        import data_pipeline.loading.reader

        data_pipeline.loading.reader.MAX_OPEN_SHARDS = 1  # so that little is held open, and much fetched again
        data = ShardFolder(url_of(folder), cache=ShardCache(tmp_path / "cache", limit))
        pipe.send(digest(data, 90, rank, 4))

    readers, processes = [], []
    for rank in range(4):
        reader, writer = PROCESSES.Pipe(duplex=False)
        processes.append(PROCESSES.Process(target=work, args=(rank, writer)))
        processes[-1].start()
        writer.close()
        readers.append(reader)
    ranks = []
    for reader in readers:
        assert reader.poll(60), "a process hangs"
        ranks.append(reader.recv())
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [list(chain(*step)) for step in zip(*ranks, strict=True)] == reference
    files = tmp_path / "cache" / "files"
    assert not list(files.glob("*.partial"))


def test_processes_that_want_the_same_shard_fetch_it_once(folder, cache, tmp_path, monkeypatch):
    log = tmp_path / "fetched"
    log.touch()
    from fsspec.implementations.local import LocalFileSystem

    get_file = LocalFileSystem.get_file

    def logged(self, path, *args, **options):
        with log.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(path + "\n")
        return get_file(self, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", logged)

    def work():
        digest(ShardFolder(url_of(folder), cache=cache))

    processes = [PROCESSES.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    shards = [line for line in log.read_text().splitlines() if "shard-" in line]
    index = ShardFolder(folder).index
    files = [file for entry in index["files"] for file in (entry, entry["offsets"])]
    assert len(shards) == len({file["sha256"] for file in files}) >= 13


def test_a_bad_shard_in_the_store_is_refused_by_name_or_skipped_as_a_local_one(folder, cache, capfd):
    flip_bit(folder / "shard-00003.tar")
    with pytest.raises(DataError, match="file://.*/shard-00003.tar has changed since it was written"):
        digest(ShardFolder(url_of(folder), cache=cache))
    remote = ShardFolder(url_of(folder), "skip", cache)
    assert digest(remote) == digest(ShardFolder(folder, "skip"))
    assert list(remote.bad_shards) == [3]
    (folder / "shard-00004.tar").unlink()
    remote = ShardFolder(url_of(folder), "skip", ShardCache(cache.folder.with_name("fresh")))
    digest(remote)
    assert sorted(remote.bad_shards) == [3, 4]
    assert "shard-00004.tar is missing" in remote.bad_shards[4]


def test_a_damaged_copy_in_the_cache_is_fetched_again(folder, cache):
    reference = digest(ShardFolder(url_of(folder), cache=cache))
    for name in sizes_in(cache):
        flip_bit(cache.files / name, -1)
    assert digest(ShardFolder(url_of(folder), cache=cache)) == reference


def test_faults_of_the_network_are_tried_again_and_then_told(folder, cache, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    get_file, faults = LocalFileSystem.get_file, []

    def failing(self, path, *args, **options):
        if "shard-00002.tar" in path and len(faults) < allowed:
            faults.append(path)
            raise ConnectionResetError("the store hung up")
        return get_file(self, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", failing)
    allowed = 2
    assert digest(ShardFolder(url_of(folder), cache=cache)) == digest(ShardFolder(folder))
    assert len(faults) == 2
    allowed = 10**6
    fresh = ShardCache(cache.folder.with_name("fresh"))
    # A network is no bad shard: to skip it would be to train on something else at every fault.
    with pytest.raises(DataError, match="cannot read file://.*shard-00002.tar .the store hung up.: check the network"):
        digest(ShardFolder(url_of(folder), "skip", fresh))


def test_protocols_without_a_package_and_unknown_ones_are_one_sentence(cache):
    if find_spec("s3fs") is None:
        with pytest.raises(DataError, match=r"cannot open s3://bucket/folder .*s3fs.*: pip install 'fsspec\[s3\]'"):
            ShardFolder("s3://bucket/folder", cache=cache)
    with pytest.raises(DataError, match="cannot open nosuch://bucket/folder: .*nosuch"):
        ShardFolder("nosuch://bucket/folder", cache=cache)


def test_an_index_from_a_store_cannot_lead_outside_the_cache(folder, cache):
    index = json.loads((folder / "index.json").read_text())
    index["tokenizer"]["files"][0]["name"] = "../../../escaped"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside the folder"):
        ShardFolder(url_of(folder), cache=cache)


def test_shards_of_a_mixture_may_be_remote(folder, cache, tmp_path):
    other = make_folder(tmp_path / "other", (9,), seed=3)
    entries = [{"path": str(folder), "weight": 1}, {"path": str(other), "weight": 1}]
    remote = [{"path": url_of(folder), "weight": 1}, {"path": str(other), "weight": 1}]
    assert digest(open_data(remote, cache=cache)) == digest(open_data(entries))


def test_files_of_others_in_the_cache_are_left_alone(folder, tmp_path):
    entries = ShardFolder(folder).index["files"]
    cache = ShardCache(tmp_path / "cache", 2 * entries[0]["bytes"] + 100)
    cache.create()
    (cache.files / "download.partial").write_bytes(b"x" * 10**6)
    (cache.files / "a.b.partial").mkdir()
    remote = ShardFolder(url_of(folder), cache=cache)._remote
    for entry in entries[:4]:
        remote.open(entry).close()
    own = {entry["sha256"] for entry in entries[2:4]}
    assert {path.name for path in cache.files.iterdir()} == own | {"download.partial", "a.b.partial"}


def test_a_cache_that_is_removed_during_a_run_is_made_again(folder, cache, monkeypatch):
    reference = digest(ShardFolder(folder))
    monkeypatch.setattr("data_pipeline.loading.reader.MAX_OPEN_SHARDS", 1)
    data = ShardFolder(url_of(folder), cache=cache)
    stream = BatchStream(data, seed=1, global_batch_rows=8, micro_batch_rows=2, rank=0, world_size=1)
    read = []
    for step in range(40):
        if step % 10 == 3:
            shutil.rmtree(cache.folder, ignore_errors=True)
        read.append([batch["labels"].sum().item() for batch in stream.next_step()])
    assert read == reference
    shutil.rmtree(cache.folder, ignore_errors=True)
    assert (data.tokenizer_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("when", ["before the download", "after it"])
def test_a_cache_that_is_removed_during_a_download_is_no_missing_shard(folder, cache, monkeypatch, when):
    from fsspec.implementations.local import LocalFileSystem

    get_file, removals = LocalFileSystem.get_file, []

    def removing(self, path, target, *args, **options):
        if removed := "shard-00002.tar" in path and len(removals) < allowed:
            removals.append(path)
        if removed and when == "before the download":
            shutil.rmtree(cache.folder)
        result = get_file(self, path, target, *args, **options)
        if removed and when == "after it":
            shutil.rmtree(cache.folder)
        return result

    monkeypatch.setattr(LocalFileSystem, "get_file", removing)
    remote = ShardFolder(url_of(folder), cache=cache)._remote
    allowed = 2
    entry = ShardFolder(folder).index["files"][2]
    with remote.open(entry) as file:
        assert file.read() == (folder / "shard-00002.tar").read_bytes()
    remote.discard(entry)
    allowed = 10**6
    with pytest.raises(
        DataError, match="the shard cache .* was removed while it was in use: choose a folder that nothing cleans"
    ):
        remote.open(entry)
    remote.discard(entry)

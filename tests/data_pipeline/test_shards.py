import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from data_pipeline.checking.verification import verify
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.shards.format import read_index, token_dtype, write_shard
from data_pipeline.shards.packing import PackedRows


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "shards")


def change_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_rows_lie_where_the_offsets_say(tmp_path):
    generator = np.random.default_rng(0)
    pieces = np.array([1, 3, 40, 3])
    rows = PackedRows(
        generator.integers(0, 2**16, (4, 32)).astype(np.uint16),
        np.arange(6 * 47, dtype=np.int64).reshape(47, 6),
        pieces,
    )
    entry = write_shard(tmp_path, "shard-00000-000", rows)
    offsets = np.load(tmp_path / "shard-00000-000.offsets.npy")
    assert offsets.dtype == np.uint64
    data = (tmp_path / entry["name"]).read_bytes()
    with tarfile.open(tmp_path / entry["name"]) as tar:
        members = tar.getmembers()
        assert [member.offset_data for member in members] == offsets.flatten().tolist()
        assert all(member.mtime == member.uid == member.gid == 0 for member in members)
        kinds = ("tokens", "spans")
        assert [m.name for m in members] == [
            f"shard-00000-000-{row:06d}.{kind}.npy" for row in range(4) for kind in kinds
        ]
        arrays = zip(rows.tokens, np.split(rows.spans, np.cumsum(pieces)[:-1]), strict=True)
        for member, array in zip(members, (array for pair in arrays for array in pair), strict=True):
            read = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
            assert read.dtype == array.dtype
            assert np.array_equal(read, array)
    assert entry["bytes"] == len(data)


def test_ids_above_65535_get_four_bytes():
    assert [token_dtype(size) for size in (50266, 65536, 65537)] == [np.uint16, np.uint16, np.uint32]


def test_a_folder_knows_what_it_holds(prepared):
    folder = ShardFolder(prepared)
    assert folder.num_rows == sum(folder.rows_per_file) == folder.index["counts"]["packed_rows"]
    assert len(folder.rows_per_file) > 2
    assert folder.tokenizer_path.is_dir()
    tokens, spans = folder.read(folder.num_rows - 1)
    assert tokens.shape == (folder.seq_len,)
    assert tokens.dtype == np.uint16
    assert spans.dtype == np.int64
    with pytest.raises(IndexError):
        folder.read(folder.num_rows)


def test_an_open_folder_travels_to_other_processes(prepared):
    folder = ShardFolder(prepared)
    tokens, _ = folder.read(5)
    travelled = pickle.dumps(folder)
    assert len(travelled) < 20_000
    assert np.array_equal(pickle.loads(travelled).read(5)[0], tokens)


def test_the_fingerprint_changes_with_a_shard_and_with_the_tokenizer(folder):
    before = ShardFolder(folder).fingerprint
    index = json.loads((folder / "index.json").read_text())
    for change in (lambda: index["files"].reverse(), lambda: index["tokenizer"].update(fingerprint="other")):
        change()
        (folder / "index.json").write_text(json.dumps(index))
        after = ShardFolder(folder).fingerprint
        assert after != before
        before = after


def test_verify_accepts_what_was_written_and_reports_every_byte(prepared):
    seen = []
    index = verify(prepared, progress=seen.append)
    unlisted = (prepared / "index.json", prepared / ".prepare.lock")
    files = [path for path in prepared.rglob("*") if path.is_file() and path not in unlisted]
    assert sum(seen) == sum(path.stat().st_size for path in files)
    assert index == read_index(prepared)


@pytest.mark.parametrize("name", ["shard-00000-001.tar", "shard-00000-000.offsets.npy", "tokenizer/tokenizer.json"])
def test_verify_names_a_file_with_one_changed_bit(folder, name):
    change_byte(folder / name, -200)
    with pytest.raises(DataError, match=f"{name} has changed since it was written"):
        verify(folder)


@pytest.mark.parametrize("count", ["packed_rows", "documents", "tokens"])
def test_verify_recounts(folder, count):
    index = json.loads((folder / "index.json").read_text())
    index["counts"][count] += 1
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=f" {count}, but its index says"):
        verify(folder)


@pytest.mark.parametrize("name", ["shard-00000-001.tar", "shard-00000-001.offsets.npy", "tokenizer/tokenizer.json"])
def test_a_missing_or_short_file_is_named_on_opening(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(DataError, match=f"{name} has {len(data) - 1} bytes, but the index says {len(data)}"):
        ShardFolder(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        ShardFolder(folder)


def test_missing_unfinished_and_foreign_folders_are_told_apart(folder, tmp_path):
    with pytest.raises(DataError, match="there is no shard folder"):
        ShardFolder(tmp_path / "nowhere")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        ShardFolder(folder)
    (folder / "index.json").write_text('{"format_')
    with pytest.raises(DataError, match="index.json cannot be read"):
        ShardFolder(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="is unfinished"):
        ShardFolder(folder)


def test_an_index_cannot_lead_outside_the_folder(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder.parent / "outside.tar").write_bytes((folder / index["files"][0]["name"]).read_bytes())
    index["files"][0]["name"] = "../outside.tar"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside the folder"):
        ShardFolder(folder)


def test_pickled_arrays_are_refused(folder):
    name = ShardFolder(folder).index["files"][0]["name"]
    path, data = folder / name, bytearray((folder / name).read_bytes())
    start = data.index(b"'descr': '<u2'")
    data[start : start + 14] = b"'descr': '|O' "
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="pickled"):
        ShardFolder(folder).read(0)

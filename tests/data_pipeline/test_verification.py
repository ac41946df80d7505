"""Verification of what is in each file, against folders that the test writes itself."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.checking import verification
from data_pipeline.checking.columns import parse_shard
from data_pipeline.checking.piece_ledger import PieceLedger, ShardPieces
from data_pipeline.checking.verification import bytes_to_verify, verify
from tests.data_pipeline.shard_folders import flip_bit
from tests.data_pipeline.written_shards import (
    ROWS_IN,
    SEQ_LEN,
    VOCAB_SIZE,
    Row,
    document,
    message,
    npy,
    row,
    sound_shards,
    write_folder,
    write_index,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "shards", sound_shards())


def test_a_sound_folder_is_accepted_by_one_process_and_by_several(folder, prepared):
    index = json.loads((folder / "index.json").read_text())
    assert verify(folder) == verify(folder, workers=2) == index
    seen = []
    verify(prepared, seen.append, workers=2)
    assert sum(seen) == bytes_to_verify(prepared)


def test_every_bad_file_is_named_and_no_other(folder):
    flip_bit(folder / "shard-00000-000.tar")
    (folder / "shard-00000-001.tar").write_bytes(b"short")
    (folder / "shard-00000-001.offsets.npy").unlink()
    flip_bit(folder / "tokenizer" / "tokenizer_config.json", 3)
    (folder / "shard-00009-000.tar").touch()
    expected = {
        "shard-00000-000.tar has changed since it was written",
        "shard-00000-001.tar has 5 bytes, but the index says",
        "shard-00000-001.offsets.npy is missing",
        "tokenizer/tokenizer_config.json has changed",
        "shard-00009-000.tar is not in the index",
    }
    for workers in (1, 3):
        said = message(folder, workers=workers)
        assert said.splitlines()[0] == f"{folder} has 5 faults:"
        for line in said.splitlines()[1:]:
            (found,) = (part for part in expected if line.startswith(f"  {folder}/{part}"))
            assert found
        assert len(said.splitlines()) == 6


def test_a_file_that_cannot_be_read_is_named(folder):
    if os.geteuid() == 0:  # root may read everything, but not a folder as a file
        (folder / "shard-00000-001.tar").unlink()
        (folder / "shard-00000-001.tar").mkdir()
    else:
        (folder / "shard-00000-001.tar").chmod(0)
    assert f"{folder}/shard-00000-001.tar cannot be read" in message(folder)


def test_a_damaged_index_is_refused(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder.parent / "outside.tar").write_bytes((folder / "shard-00000-000.tar").read_bytes())
    index["files"][0]["name"] = "../outside.tar"
    (folder / "index.json").write_text(json.dumps(index))
    assert "outside the folder" in message(folder)
    (folder / "index.json").write_text(json.dumps({"format_version": 1}))
    assert "is damaged" in message(folder)


def test_columns_are_what_tarfile_and_numpy_read(prepared):
    index = json.loads((prepared / "index.json").read_text())
    for entry in index["files"]:
        tar = np.fromfile(prepared / entry["name"], dtype=np.uint8)
        offsets = np.load(prepared / entry["offsets"]["name"])
        shard = parse_shard(entry["name"], tar, offsets, index["seq_len"], np.uint16)
        with tarfile.open(prepared / entry["name"]) as file:
            arrays = [np.load(io.BytesIO(file.extractfile(member).read())) for member in file.getmembers()]
        assert np.array_equal(shard.tokens(0, len(offsets)), np.stack(arrays[::2]))
        assert np.array_equal(shard.spans, np.concatenate(arrays[1::2]))
        assert np.array_equal(shard.piece_rows, np.repeat(np.arange(len(offsets)), [len(a) for a in arrays[1::2]]))
        assert np.array_equal(shard.row_ends, [spans[-1, 2] for spans in arrays[1::2]])


def change(part: int, place, value) -> Callable[[list[Row]], None]:
    """Changes tokens (part 0) or spans (1) of the first row of a shard."""

    def edit(rows: list[Row]) -> None:
        rows[0][part][place] = value

    return edit


WRONG_ROWS = {
    "a token is beyond the vocabulary": change(0, 3, VOCAB_SIZE),
    "its padding contains tokens": change(0, -1, 10),
    "a document does not begin with <s>": change(0, 0, 10),
    "an answer does not follow <sep>": change(1, (0, 1), 4),
    "its pieces do not follow each other without gaps": change(1, (0, 0), 1),
    "a piece ends before its start or past the row": change(1, (0, 2), SEQ_LEN + 1),
    "an answer begins outside its piece": change(1, (0, 1), 12),
    "a document ends without an answer": change(1, (0, 1), 10),
    "a source, input row or offset is negative": change(1, (0, 3), -1),
    "a source has no name in the index": change(1, (0, 3), 2),
    "an input row is beyond the number of rows read": change(1, (0, 4), ROWS_IN),
    "its tokens are not uint16": lambda rows: rows.__setitem__(0, (rows[0][0].astype(np.int16), rows[0][1])),
    "its spans are not int64": lambda rows: rows.__setitem__(0, (rows[0][0], rows[0][1].astype(np.int32))),
}


@pytest.mark.parametrize("what", WRONG_ROWS)
def test_rows_that_break_the_format_are_told(tmp_path, what):
    shards = sound_shards()
    shards[0] = [row(*document(0, 3, 4)), shards[0][1]]  # 10 tokens: room for padding
    WRONG_ROWS[what](shards[0])
    said = message(write_folder(tmp_path / "shards", shards))
    assert "shard-00000-000.tar breaks the format of shards, row 0: " in said
    assert what in said
    assert "\n" not in said


def set_bytes(position: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda tar: tar[:position] + new + tar[position + len(new) :]


def with_valid_checksum(edit: Callable[[bytes], bytes], at: int = 0) -> Callable[[bytes], bytes]:
    """Mends the checksum of the header at a position."""

    def edited(tar: bytes) -> bytes:
        tar = edit(tar)
        header = tar[at : at + 512]
        total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
        return set_bytes(at + 148, b"%06o" % total)(tar)

    return edited


def without_spans(tar: bytes) -> bytes:
    """Leaves the first row an empty array of spans."""
    tar = set_bytes(1024 + 124, b"%011o" % 128)(tar)
    return set_bytes(1536 + 128, bytes(48))(tar.replace(b"(1, 6)", b"(0, 6)", 1))


FIRST_NAME = "shard-00000-000-000000.tokens.npy"
WRONG_TARS = {
    "another name": (with_valid_checksum(set_bytes(0, b"other")), "does not lead to the member with the row's name"),
    "another mode": (with_valid_checksum(set_bytes(100, b"0000755")), "header is not a plain ustar header"),
    "a link": (with_valid_checksum(set_bytes(156, b"2")), "header is not a plain ustar header"),
    "a wrong checksum": (set_bytes(148, b"000000"), "header is not a plain ustar header"),
    "no number": (with_valid_checksum(set_bytes(124, b"0000000024x")), "header is not a plain ustar header"),
    "another size": (with_valid_checksum(set_bytes(124, b"%011o" % 2000)), "members do not follow each other"),
    "a longer member": (with_valid_checksum(set_bytes(124, b"%011o" % 162)), "tokens are not uint16"),
    "longer spans": (with_valid_checksum(set_bytes(1024 + 124, b"%011o" % 178), at=1024), "spans are not int64"),
    "no spans": (with_valid_checksum(without_spans, at=1024), "spans are not int64"),
    "filled with other than zeros": (set_bytes(512 + 500, b"x"), "not padded with zeros"),
    "something at the end": (lambda tar: tar[:-1] + b"x", "data after its last row"),
    "records at its end": (lambda tar: tar + bytes(10240), "blocks, but its 2 rows take"),
    "half a record": (lambda tar: tar + bytes(512), "not a multiple of 10240"),
    "another first array": (lambda tar: tar.replace(b"(16,)", b"(15,)"), "tokens are not uint16"),
    "another order": (lambda tar: tar.replace(b"order': False", b"order': True "), "tokens are not uint16"),
}


@pytest.mark.parametrize("name", WRONG_TARS)
def test_a_tar_that_is_not_plain_is_told(folder, name):
    edit, what = WRONG_TARS[name]
    path = folder / "shard-00000-000.tar"
    before = path.read_bytes()
    assert before.startswith(FIRST_NAME.encode())
    path.write_bytes(edit(before))
    assert path.read_bytes() != before
    write_index(folder)
    said = message(folder)
    assert said.startswith(f"{path} breaks the format of shards")
    assert what in said


def test_a_member_that_no_offset_leads_to_is_told(folder):
    path = folder / "shard-00000-002.tar"
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("extra"))
    write_index(folder)
    assert "data after its last row" in message(folder)


WRONG_OFFSETS = {
    "another place": (lambda offsets: offsets + 512, "does not lead to the member"),
    "no whole block": (lambda offsets: offsets + 8, "not a possible position of a tar member"),
    "behind the tar": (lambda offsets: offsets + 2**40, "not a possible position of a tar member"),
    "other rows first": (lambda offsets: offsets[::-1].copy(), "does not lead to the member"),
    "a row less": (lambda offsets: offsets[:-1], "data after its last row"),
    "signed": (lambda offsets: offsets.astype(np.int64), "not uint64"),
    "no rows": (lambda offsets: offsets[:0], "not uint64 [rows, 2]"),
}


@pytest.mark.parametrize("name", WRONG_OFFSETS)
def test_offsets_that_do_not_fit_are_told(folder, name):
    edit, what = WRONG_OFFSETS[name]
    path = folder / "shard-00000-002.offsets.npy"
    path.write_bytes(npy(edit(np.load(path))))
    write_index(folder)
    said = message(folder)
    assert "shard-00000-002.tar" in said
    assert what in said


def test_an_offsets_file_that_is_no_array_is_named(folder):
    (folder / "shard-00000-002.offsets.npy").write_bytes(b"no array")
    assert "shard-00000-002.offsets.npy is not a numpy array" in message(write_index(folder))


def test_a_wrong_number_of_rows_is_told(folder):
    index = json.loads((folder / "index.json").read_text())
    index["files"][1]["rows"] += 1
    assert "it has 2 rows, but the index says 3" in message(write_index(folder, index))


def test_a_folder_behind_a_url_is_refused():
    assert "s3://bucket/shards is not on this machine" in message("s3://bucket/shards")


def end_at_once(*_) -> None:
    os._exit(9)


def test_a_killed_process_is_told(folder, monkeypatch):
    monkeypatch.setattr(verification, "_check_shard", end_at_once)
    assert "was killed" in message(folder, workers=2)


def test_the_number_of_workers_is_checked(folder):
    assert "workers is 0" in message(folder, workers=0)


def test_many_faults_of_one_kind_are_one_message():
    whole = np.arange(100_000)
    none = np.empty((0, 8), dtype=np.int64)
    ledger = PieceLedger([ShardPieces(whole, none, len(whole)), ShardPieces(whole[::2], none, len(whole) // 2)], [0, 0])
    assert list(ledger.problems()) == [((0, 1), "input row 0 (and 49999 more like it) occurs more than once")]

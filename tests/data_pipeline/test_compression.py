"""Compressed JSON lines: the same rows, in parts where the format allows it, and damage is named."""

import bz2
import gzip
import json
import lzma
import struct
import zlib
from shutil import which
from subprocess import run

import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.prepare import prepare
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.compression import _zstd_frames, independent_parts
from data_pipeline.sources.source import open_source

ROWS = [{"question": f"q {n}", "answer": f"{n} " * (n % 50), "source": "s"} for n in range(2000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [tuple(row.values()) for row in ROWS]


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data).to_pybytes()


def bgzip(data: bytes) -> bytes:
    """Compress like bgzip does (SAM specification, 4.1): small blocks with their sizes in the headers, and an empty one."""
    blocks = []
    for start in [*range(0, len(data), 5000), len(data)]:
        block = data[start : start + 5000]
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = packer.compress(block) + packer.flush()
        header = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff\x06\x00BC\x02\x00" + struct.pack("<H", len(body) + 25)
        blocks.append(header + body + struct.pack("<II", zlib.crc32(block), len(block)))
    return b"".join(blocks)


def pzstd(data: bytes, step: int = 5000) -> bytes:
    """Compress like pzstd does: each frame follows a skippable one."""
    skippable = struct.pack("<III", 0x184D2A50, 4, 0)
    return b"".join(skippable + zstd(data[start : start + step]) for start in range(0, len(data), step))


WHOLE = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}
DIVIDED = {".zst": pzstd, ".gz": bgzip}


def read(source):
    return [row for frame in open_source(str(source)).frames(BadRows()) for row in frame.rows()]


@pytest.mark.parametrize("suffix", WHOLE)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson"])
def test_compressed_lines_are_the_same_rows(tmp_path, kind, suffix):
    file = tmp_path / f"a{kind}{suffix}"
    file.write_bytes(WHOLE[suffix](LINES))
    assert read(file) == TEXTS
    (tmp_path / f"b{kind}{suffix}").write_bytes(b"")
    (tmp_path / f"c{kind}{suffix}").write_bytes(WHOLE[suffix](b""))
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", DIVIDED)
@pytest.mark.parametrize("size", [1, 3000, 10**9])
def test_parts_are_read_on_their_own_and_each_line_once(tmp_path, monkeypatch, suffix, size):
    monkeypatch.setattr("data_pipeline.sources.compression.COMPRESSED_BYTES_PER_CHUNK", size)
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(DIVIDED[suffix](LINES))
    source = open_source(str(file))
    assert (len(source.chunks) > 5) == (size < 10**9)
    assert read(file) == TEXTS
    bad = LINES.splitlines(keepends=True)
    bad[1234] = b"{\n"
    file.write_bytes(DIVIDED[suffix](b"".join(bad)))
    with pytest.raises(DataError, match="line 1235: it is not valid JSON"):
        read(file)


def test_a_line_may_be_longer_than_many_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.compression.COMPRESSED_BYTES_PER_CHUNK", 1)
    for lines in (LINES[:7000], b"\n" + LINES[:7000], LINES[:7000] + b"\n\n"):
        (tmp_path / "a.jsonl.zst").write_bytes(pzstd(lines, step=7))
        rows = [tuple(json.loads(line).values()) for line in lines.strip().splitlines()[:-1]]
        with pytest.raises(DataError, match=f"line {lines.rstrip().count(10) + 1}: it is not valid JSON"):
            read(tmp_path / "a.jsonl.zst")
        whole = lines[: lines.rstrip().rindex(b"\n")]
        (tmp_path / "a.jsonl.zst").write_bytes(pzstd(whole, step=7))
        assert read(tmp_path / "a.jsonl.zst") == rows


def test_frames_are_found_in_what_the_zstd_command_writes(tmp_path):
    """Its frames have checksums, and blocks of all kinds."""
    if which("zstd") is None:
        pytest.skip("install zstd")
    frames = b""
    for data in (LINES, b"", b"a" * 10**6, bytes(range(256)) * 4):
        for level in ("-1", "-19"):
            frame = run(["zstd", "-c", level, "--check"], input=data, capture_output=True, check=True).stdout
            (tmp_path / "a.zst").write_bytes(frames + frame)
            with (tmp_path / "a.zst").open("rb") as file:
                ends = list(_zstd_frames(file.fileno(), len(frames + frame)))
            assert ends[-1] == len(frames + frame)
            assert len(frames) in [0, *ends]
            frames += frame


@pytest.mark.parametrize("suffix", WHOLE)
def test_a_truncated_file_is_named(tmp_path, suffix):
    (tmp_path / f"bad.jsonl{suffix}").write_bytes(WHOLE[suffix](LINES)[:-9])
    with pytest.raises(DataError, match=f"bad.jsonl{suffix} cannot be read after line .*: download it again"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", WHOLE)
def test_a_file_that_is_not_compressed_as_its_name_says_is_named(tmp_path, suffix):
    (tmp_path / f"bad.jsonl{suffix}").write_bytes(LINES)
    with pytest.raises(DataError, match=f"bad.jsonl{suffix} cannot be read after line 0: download it again"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", DIVIDED)
def test_damage_between_parts_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("data_pipeline.sources.compression.COMPRESSED_BYTES_PER_CHUNK", 3000)
    file = tmp_path / f"bad.jsonl{suffix}"
    data = DIVIDED[suffix](LINES)
    file.write_bytes(data)
    start = independent_parts(file)[2][0]
    file.write_bytes(data[:start] + b"damage" + data[start + 6 :])
    with pytest.raises(DataError, match="cannot be read after line"):
        read(file)


def test_several_workers_give_the_same_bytes_and_large_files_of_one_part_are_told(
    tmp_path, monkeypatch, settings, capsys
):
    monkeypatch.setattr("data_pipeline.sources.compression.COMPRESSED_BYTES_PER_CHUNK", 3000)
    monkeypatch.setattr("data_pipeline.sources.source.LARGE_FILE", 1000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl.zst").write_bytes(pzstd(LINES))
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(LINES.replace(b'"q ', b'"Q ')))
    indexes = [
        prepare(str(folder), tmp_path / f"out{workers}", settings, workers=workers, progress=workers == 1)
        for workers in (1, 2)
    ]
    assert indexes[0] == indexes[1]
    assert "cannot be divided between workers: b.jsonl.xz (JSON lines can be" in capsys.readouterr().err

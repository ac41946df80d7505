"""WebDataset tars of text."""

import io
import json
import tarfile

import pytest
import webdataset

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.source import open_source

TEXTS = [(f"q{n}\n", "ü" * n, "web") for n in range(40)]


def write(path, samples, form=tarfile.PAX_FORMAT):
    """Write members by name, `samples` being a list of pairs."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def read(path):
    return [row for frame in open_source(str(path)).frames(BadRows()) for row in frame.rows()]


@pytest.mark.parametrize("size", [1, 5000, 10**9])
def test_what_webdataset_writes_is_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", size)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, (question, answer, source) in enumerate(TEXTS):
            key = f"part.1/{number:05}" if number % 2 else f"{number:05}"
            if number % 3:
                row = {"question": question, "answer": answer, "source": source}
                writer.write({"__key__": key, "json": row, "jpg": b"\xff\xd8"})
            else:
                texts = {"question.txt": question, "answer.txt": answer, "source.txt": source}
                writer.write({"__key__": key, **texts})
    assert read(tmp_path) == TEXTS
    assert (len(open_source(str(tmp_path)).chunks) > 1) == (size < 10**9)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_tars_behind_one_another(tmp_path, monkeypatch, form):
    monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", 1)
    folder = "/".join(["d" * 60] * (2 if form == tarfile.USTAR_FORMAT else 5))
    members = [
        (f"{folder}/é{n}.{column}.txt", text.encode())
        for n, texts in enumerate(TEXTS)
        for column, text in zip(("question", "answer", "source"), texts, strict=True)
    ]
    write(tmp_path / "a.tar", members, form)
    assert read(tmp_path) == TEXTS
    once = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(once * 2)
    assert read(tmp_path) == TEXTS * 2


def test_bad_samples_are_named_or_counted(tmp_path):
    good = json.dumps({"question": "q", "answer": "a"}).encode()
    samples = [
        ("1.json", good),
        ("2.json", good[:-3]),
        ("3.question.txt", b"\xff"),
        ("4.json", good),
        ("4.answer.txt", b"b"),
        ("5.jpg", b""),
        ("6.json", good),
        ("README", b"no sample"),
    ]
    write(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match="a.tar, sample 2: it is not valid JSON"):
        read(tmp_path)
    bad = BadRows("skip")
    rows = [row[0] for frame in open_source(str(tmp_path)).frames(bad) for row in frame.rows()]
    assert rows == ["q", None, None, None, None, "q"]
    assert list(bad.counts) == [
        "not valid JSON",
        "text that is not UTF-8",
        "a column twice",
        "no column question and no column answer",
    ]


def test_a_damaged_tar_is_named(tmp_path):
    write(tmp_path / "a.tar", [(f"{n}.json", b'{"question": "q", "answer": "a"}') for n in range(9)])
    whole = (tmp_path / "a.tar").read_bytes()
    members = 9 * 1024
    for data in (
        whole[:members],
        whole[: members - 600],
        whole[:5000],
        b"no tar",
        whole[:1024] + b"x" * 512 + whole[1536:],
    ):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match="a.tar is not a readable tar: download it again"):
            open_source(str(tmp_path))
    (tmp_path / "a.tar").write_bytes(whole[members:])
    (tmp_path / "b.tar").write_bytes(whole)
    assert read(tmp_path) == [("q", "a", "b.tar")] * 9

import gzip
import json

import polars as pl
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources import HubSource, open_source

ROWS = [{"question": f"q{n}", "answer": f"a{n}", "source": "forum", "index": n} for n in range(10)]
TEXTS = [(f"q{n}", f"a{n}", "forum") for n in range(10)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(source, rows=4):
    return [row for frame in open_source(source).batches(rows) for row in frame.rows()]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet", row_group_size=3)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS))
    for name in ("a.parquet", "b.jsonl", "c.jsonl.gz"):
        assert read(str(tmp_path / name)) == TEXTS
    assert read(str(tmp_path)) == TEXTS * 3
    assert read(str(tmp_path / "*.jsonl")) == TEXTS
    assert read([str(tmp_path / "b.jsonl"), str(tmp_path / "a.parquet")]) == TEXTS * 2
    assert open_source(str(tmp_path / "a.parquet")).num_rows == 10
    assert open_source(str(tmp_path)).num_rows is None


def test_batches_have_the_size_asked_for(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    frames = list(open_source(str(tmp_path)).batches(4))
    assert [len(frame) for frame in frames] == [4, 4, 2]
    assert frames[0].schema == dict.fromkeys(("question", "answer", "source"), pl.String)


def test_nulls_are_empty_and_a_missing_source_is_the_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"answer": None, "question": "q"}])
    pl.DataFrame({"answer": ["a", None], "question": [None, "q"]}).write_parquet(tmp_path / "b.parquet")
    assert read(str(tmp_path)) == [("q", "", "a.jsonl"), ("", "a", "b.parquet"), ("q", "", "b.parquet")]


def test_a_dataset_is_streamed_by_column_name(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    source = HubSource(str(tmp_path))
    assert [row for frame in source.batches(4) for row in frame.rows()] == TEXTS


def test_the_sample_is_deterministic():
    source = open_source("sample")
    assert source.num_rows > 1000
    assert source.identity == open_source("sample").identity


def test_a_name_that_is_neither_a_path_nor_on_the_hub_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'nobody/nothing' is neither a path here nor a reachable hub dataset"):
        open_source("nobody/nothing")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"question": "q", "answer": "a"}\n{"question": "q", ', "bad.jsonl, line 2 is not valid JSON"),
        (b"[1]\n", "bad.jsonl, line 1 is not a JSON object"),
        (b'{"question": "q", "reply": "a"}\n', "bad.jsonl, line 1, has no column answer: it has question, reply"),
        (b'{"question": "q", "answer": 5}\n', "bad.jsonl, line 1, holds a int as answer"),
        (b'{"question": "q", "answer": "\\ud800"}\n', "bad.jsonl, line 1, has half a surrogate pair in its answer"),
        (b'{"question": "\xff", "answer": "a"}\n', "bad.jsonl, line 1 is not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, sentence):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read(str(tmp_path))


def test_a_truncated_gzip_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 100)[:-9])
    with pytest.raises(DataError, match="bad.jsonl.gz cannot be read after line"):
        read(str(tmp_path))


def test_a_corrupt_parquet_is_named(tmp_path):
    path = tmp_path / "bad.parquet"
    pl.DataFrame(ROWS * 1000).write_parquet(path, row_group_size=2000, compression="zstd")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="bad.parquet is not a readable parquet file"):
        open_source(str(path))
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    with pytest.raises(DataError, match="bad.parquet is corrupt in row group 0"):
        read(str(path))


def test_missing_or_wrong_columns_are_listed(tmp_path):
    pl.DataFrame({"prompt": ["q"], "answer": ["a"]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has no column question: it has prompt, answer, and question"):
        open_source(str(tmp_path))
    pl.DataFrame({"question": ["q"], "answer": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column answer of .*a.parquet holds int64, not text"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("source", ["./nowhere", "nowhere/*.parquet", "README.rst", "."])
def test_a_path_without_data_is_named(tmp_path, monkeypatch, source):
    (tmp_path / "README.rst").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=source.replace("*", r"\*")):
        open_source(source)

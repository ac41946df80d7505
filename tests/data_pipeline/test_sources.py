import gzip
import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.hub import HubChunk, hub_chunks
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.source import open_source

ROWS = [{"question": f"q{n}", "answer": f"a{n}", "source": "forum", "index": n} for n in range(10)]
TEXTS = [(f"q{n}", f"a{n}", "forum") for n in range(10)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(source):
    return [row for frame in open_source(source).frames(BadRows()) for row in frame.rows()]


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


def test_a_linked_folder_is_read_once_also_where_links_go_round(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    write_jsonl(elsewhere / "a.jsonl", ROWS)
    for name, target in (("disk", elsewhere), ("disk-again", elsewhere), ("up", data)):
        (data / name).symlink_to(target)
    (elsewhere / "back").symlink_to(data)
    assert read(str(data)) == TEXTS


@pytest.mark.parametrize("size", [1, 7, 50, 63, 64, 10_000])
def test_every_line_is_in_one_chunk_wherever_a_file_is_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", size)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(ROWS[0]))  # a blank line, and no newline at the end
    source = open_source(str(tmp_path))
    assert read(str(tmp_path)) == [*TEXTS, TEXTS[0]]
    assert len(source.chunks) == sum(-(-file.stat().st_size // size) for file in tmp_path.iterdir())
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "{\n")
    with pytest.raises(DataError, match="a.jsonl, line 11: it is not valid JSON"):
        read(str(tmp_path))


def test_row_groups_are_put_together_to_chunks_and_never_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.chunk.ROWS_PER_CHUNK", 5)
    for group_rows, expected in ((1, [5, 5]), (2, [4, 4, 2]), (3, [3, 3, 4]), (7, [7, 3]), (10, [10])):
        pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet", row_group_size=group_rows)
        source = open_source(str(tmp_path / "a.parquet"))
        assert [
            sum(len(frame) for frame in chunk.frames(source.layout, BadRows())) for chunk in source.chunks
        ] == expected
        assert read(str(tmp_path / "a.parquet")) == TEXTS


def test_frames_hold_no_more_rows_than_fit_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.rows.ROWS_PER_FRAME", 4)
    monkeypatch.setattr("data_pipeline.sources.parquet.ROWS_PER_FRAME", 4)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    pl.DataFrame(ROWS).write_parquet(tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        frames = list(open_source(str(tmp_path / name)).frames(BadRows()))
        assert [len(frame) for frame in frames] == [4, 4, 2]
        assert frames[0].schema == dict.fromkeys(("prompt", "answer", "source"), pl.String)


def test_nulls_are_empty_and_a_missing_source_is_the_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"answer": None, "question": "q"}])
    pl.DataFrame({"answer": ["a", None], "question": [None, "q"]}).write_parquet(tmp_path / "b.parquet")
    assert read(str(tmp_path)) == [("q", "", "a.jsonl"), ("", "a", "b.parquet"), ("q", "", "b.parquet")]


@pytest.fixture
def dataset(tmp_path):
    """A dataset folder of three files, as the hub would serve it."""
    for part in range(3):
        pl.DataFrame(ROWS[4 * part : 4 * part + 4]).write_parquet(tmp_path / f"train-0000{part}-of-00003.parquet")
    return tmp_path


def test_a_dataset_is_streamed_file_by_file_by_column_name(dataset):
    _, chunks, layout = hub_chunks(str(dataset), LayoutChoice())
    texts = [[row for frame in chunk.frames(layout, BadRows()) for row in frame.rows()] for chunk in chunks]
    assert texts == [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]


def test_a_network_fault_is_told_and_repeats_from_the_row_that_it_struck(dataset, monkeypatch, capsys):
    _, chunks, layout = hub_chunks(str(dataset), LayoutChoice())
    monkeypatch.setattr("data_pipeline.sources.rows.ROWS_PER_FRAME", 2)
    monkeypatch.setattr("data_pipeline.sources.hub.WAITS", (0, 0))
    faults = [1, 3]  # the connection breaks at these rows' first reading

    read_rows = HubChunk._rows

    def fragile(*arguments):
        for row, where in read_rows(*arguments):
            number = int(row["question"][1:])
            if number in faults:
                faults.remove(number)
                raise ConnectionResetError("the peer has gone")
            yield row, where

    monkeypatch.setattr(HubChunk, "_rows", fragile)
    assert [row for frame in chunks[0].frames(layout, BadRows()) for row in frame.rows()] == TEXTS[:4]
    said = capsys.readouterr().err
    assert "file 1 of 3 of the hub dataset" in said
    assert "stopped after 2 rows (the peer has gone)" in said
    faults += [0, 0, 0]
    with pytest.raises(DataError, match="stopped after 0 rows: check the network and run again"):
        list(chunks[0].frames(layout, BadRows()))


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
        (b'{"question": "q", "answer": "a"}\n{"question": "q", ', "bad.jsonl, line 2: it is not valid JSON"),
        (b"[1]\n", "bad.jsonl, line 1: it is not a JSON object, but of type list"),
        (
            b'{"question": "q", "answer": "a"}\n{"question": "q", "reply": "a"}\n',
            "bad.jsonl, line 2: there is no column answer; the columns are question, reply; or skip bad rows with --on-bad-row",
        ),
        (b'{"question": "q", "answer": [5]}\n', "bad.jsonl, line 1: answer is of type list, not text"),
        (b'{"question": "q", "answer": "\\ud800"}\n', "bad.jsonl, line 1: answer has half a surrogate pair"),
        (b'{"question": "\xff", "answer": "a"}\n', "bad.jsonl, line 1: it is not valid JSON"),
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
    with pytest.raises(DataError, match="a.parquet has the columns prompt, answer, which fit no layout: say which"):
        open_source(str(tmp_path))
    pl.DataFrame({"question": ["q"], "answer": ["a"]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"question": ["q"], "reply": ["a"]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet has no column answer: it has question, reply, and the layout"):
        open_source(str(tmp_path))
    pl.DataFrame({"question": ["q"], "answer": [[1]]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"the column answer of .*a.parquet holds large_list<.*>, not text"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("source", ["./nowhere", "nowhere/*.parquet", "README.rst", "."])
def test_a_path_without_data_is_named(tmp_path, monkeypatch, source):
    (tmp_path / "README.rst").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=source.replace("*", r"\*")):
        open_source(source)


def test_long_rows_come_in_small_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.rows.BYTES_PER_FRAME", 5000)
    monkeypatch.setattr("data_pipeline.sources.parquet.BYTES_PER_FRAME", 5000)
    rows = [{"question": f"q{n}", "answer": f"{n:04}" * 250, "source": "s"} for n in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pl.DataFrame(rows).write_parquet(tmp_path / "b.parquet", compression="uncompressed")
    for name in ("a.jsonl", "b.parquet"):
        frames = list(open_source(str(tmp_path / name)).frames(BadRows()))
        assert max(map(len, frames)) <= 6
        assert sum(map(len, frames)) == 40


def test_bytes_that_are_no_utf8_in_parquet_are_named(tmp_path):
    offsets, letters = pa.py_buffer(bytes([0, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"caf\xe9")
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, letters])
    pq.write_table(pa.table({"question": broken, "answer": ["a"]}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="bad.parquet, row 1: it has text that is not UTF-8"):
        read(str(tmp_path))


def test_a_file_named_twice_is_read_once(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "A.JSONL", ROWS)
    monkeypatch.chdir(tmp_path)
    assert open_source(["./A.JSONL", str(tmp_path / "A.JSONL"), str(tmp_path)]).num_rows is None
    assert len(read(["./A.JSONL", str(tmp_path / "A.JSONL"), str(tmp_path)])) == len(TEXTS)

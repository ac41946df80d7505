"""Arrow files, streams and the folders that `save_to_disk` makes."""

import datasets
import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.files import FileChoice, find_files
from data_pipeline.sources.source import open_source

TEXTS = [(f"q{n}", f"a{n}", f"s{n % 3}") for n in range(50)]
TABLE = pa.table(
    {
        "n": range(50),
        **dict(zip(("answer", "question", "source"), zip(*((a, q, s) for q, a, s in TEXTS), strict=True), strict=True)),
    }
)
NEW = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}


def write(path, kind, table=TABLE, rows=7, compression=None):
    with NEW[kind](str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows)


def read(source, **options):
    return [
        row for frame in open_source(str(source), files=FileChoice(**options)).frames(BadRows()) for row in frame.rows()
    ]


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_rows_are_divided_into_small_chunks_whatever_the_batches_are(tmp_path, monkeypatch, kind, rows, compression):
    monkeypatch.setattr("data_pipeline.sources.chunk.ROWS_PER_CHUNK", 10)
    monkeypatch.setattr("data_pipeline.sources.arrow.ROWS_PER_FRAME", 4)
    write(tmp_path / "a.arrow", kind, rows=rows, compression=compression)
    source = open_source(str(tmp_path))
    assert source.num_rows == 50
    assert [chunk.rows for chunk in source.chunks] == {1: [10] * 5, 7: [7] * 6 + [8], 50: [10] * 5}[rows]
    assert [sum(map(len, chunk.frames(source.layout, BadRows()))) for chunk in source.chunks] == [
        chunk.rows for chunk in source.chunks
    ]
    assert max(len(frame) for frame in source.frames(BadRows())) <= 4
    assert read(tmp_path) == TEXTS
    assert [
        row
        for chunk in reversed(source.chunks)
        for frame in chunk.frames(source.layout, BadRows())
        for row in frame.rows()
    ][:1] == [TEXTS[-source.chunks[-1].rows]]


@pytest.mark.parametrize("kind", NEW)
def test_values_that_are_stored_by_number_are_texts(tmp_path, kind):
    table = TABLE.set_column(3, "source", TABLE["source"].combine_chunks().dictionary_encode())
    write(tmp_path / "a.feather", kind, table)
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("kind", NEW)
def test_text_that_is_not_utf8_is_named_or_counted(tmp_path, kind):
    texts = pa.array([b"a", b"b", b"caf\xe9", b"d"]).view(pa.string())
    write(tmp_path / "a.ipc", kind, pa.table({"question": texts, "answer": list("wxyz")}), rows=2)
    with pytest.raises(DataError, match="a.ipc, row 3: it has text that is not UTF-8"):
        read(tmp_path)
    bad = BadRows("skip")
    rows = [row[0] for frame in open_source(str(tmp_path)).frames(bad) for row in frame.rows()]
    assert rows == ["a", "b", None, "d"]
    assert bad.counts == {"text that is not UTF-8": 1}


@pytest.mark.parametrize("kind", NEW)
def test_a_damaged_file_is_named(tmp_path, kind):
    write(tmp_path / "bad.arrow", kind)
    whole = (tmp_path / "bad.arrow").read_bytes()
    for data in (whole[: len(whole) // 2], b"no arrow file", whole[:5]):
        (tmp_path / "bad.arrow").write_bytes(data)
        with pytest.raises(DataError, match="bad.arrow is not a readable Arrow file or stream: download it again"):
            read(tmp_path)
    (tmp_path / "bad.arrow").write_bytes(b"")
    write(tmp_path / "good.arrow", kind)
    assert read(tmp_path) == TEXTS
    write(tmp_path / "bad.arrow", kind, TABLE.drop_columns("question"))
    with pytest.raises(DataError, match="bad.arrow has the columns n, answer, source, which fit no layout"):
        open_source(str(tmp_path))


def test_what_save_to_disk_writes_is_read_without_its_caches(tmp_path):
    dataset = datasets.Dataset.from_list([{"question": q, "answer": a, "source": s} for q, a, s in TEXTS])
    dataset.save_to_disk(tmp_path / "one", num_shards=3)
    assert read(tmp_path / "one") == TEXTS
    loaded = datasets.load_from_disk(str(tmp_path / "one"))
    loaded.map(lambda row: {"answer": row["answer"] + "!"})  # `map` leaves a cache beside the files
    left = dict(find_files([str(tmp_path / "one")]).left)
    assert {name: reason for name, reason in left.items() if name.startswith("cache-")} and read(
        tmp_path / "one"
    ) == TEXTS
    parts = {"sft": dataset.select(range(10)), "test": dataset.select(range(10, 50)), "train": dataset.select([7])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "several", split="sft") == TEXTS[:10]
    assert read(tmp_path / "several") == [TEXTS[7]]
    assert read(tmp_path / "several" / "test") == TEXTS[10:]

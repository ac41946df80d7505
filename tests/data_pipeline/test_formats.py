"""Lists in JSON files, WebDataset tars, and what holds for every kind of file."""

import gzip
import io
import json
from dataclasses import replace

import polars as pl
import pytest
import webdataset

from data_pipeline.errors import DataError
from data_pipeline.preparation.prepare import prepare
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.formats import FORMATS
from data_pipeline.sources.source import open_source

ROWS = [{"question": f"q{n} é", "answer": f"a{n}\nb", "source": "forum", "more": [n]} for n in range(50)]
TEXTS = [(row["question"], row["answer"], row["source"]) for row in ROWS]
FLAT = pl.DataFrame([{name: row[name] for name in ("question", "answer", "source")} for row in ROWS])


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tar(rows) -> bytes:
    content = io.BytesIO()
    with webdataset.TarWriter(content) as writer:
        for number, row in enumerate(rows):
            writer.write({"__key__": f"part.1/{number:03}", "json": row})
    return content.getvalue()


def arrow() -> bytes:
    content = io.BytesIO()
    FLAT.write_ipc_stream(content)
    return content.getvalue()


CONTENTS = {
    ".parquet": lambda: (content := io.BytesIO(), FLAT.write_parquet(content))[0].getvalue(),
    ".arrow": arrow,
    ".jsonl": lambda: lines(ROWS),
    ".ndjson": lambda: lines(ROWS),
    ".json": lambda: json.dumps(ROWS, indent=1).encode(),
    ".csv": lambda: FLAT.write_csv().encode(),
    ".tsv": lambda: FLAT.write_csv(separator="\t").encode(),
    ".tar": lambda: tar(ROWS),
    ".json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    ".csv.gz": lambda: gzip.compress(FLAT.write_csv().encode()),
}


def read(source, bad_rows=None):
    found = open_source(str(source))
    return [row for frame in found.frames(bad_rows or BadRows()) for row in frame.rows()]


@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows_to_any_number_of_workers(tmp_path, prepared, settings, suffix):
    assert suffix in FORMATS
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}{suffix}").write_bytes(CONTENTS[suffix]())
    assert read(folder) == TEXTS * 2
    settings = replace(settings, tokenizer=str(prepared / "tokenizer"))
    indexes = [prepare(str(folder), tmp_path / f"{n}", settings, workers=n, progress=False) for n in (1, 2)]
    assert indexes[0] == indexes[1]
    assert indexes[0]["counts"]["rows_dropped"]["duplicate"] == 50


@pytest.mark.parametrize("suffix", sorted(CONTENTS.keys() - {".csv", ".tsv"}))  # these may end anywhere
def test_half_a_file_is_an_error_that_names_it(tmp_path, suffix):
    whole = CONTENTS[suffix]()
    (tmp_path / f"bad{suffix}").write_bytes(whole[: len(whole) // 2])
    is_lines = suffix in (".jsonl", ".ndjson")
    match = f"bad{suffix}" + (r", line \d+: it is not valid JSON" if is_lines else " (is not a|cannot be read)")
    with pytest.raises(DataError, match=match):
        read(tmp_path)


def test_a_json_file_may_hold_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(lines(ROWS))
    assert read(tmp_path) == TEXTS


def test_plain_texts_in_a_tar_are_a_layout(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "1", "txt": "one"})
        writer.write({"__key__": "2", "txt": "zwei ü"})
    assert read(tmp_path) == [("one", "a.tar"), ("zwei ü", "a.tar")]


def test_shards_are_no_tars_of_text(prepared):
    with pytest.raises(DataError, match=r".tar has the columns none, which fit no layout"):
        open_source(str(sorted(prepared.glob("*.tar"))[0]))

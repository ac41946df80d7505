"""`.json` files: arrays that are read piece by piece, and lines."""

import gzip
import json
import tracemalloc

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.json_array import JsonArrayChunk
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.source import open_source

ROWS = [
    {"question": f'q{n} \u00fc\U0001f600 ["', "n": [n, -1.5e3, {"x": None}], "answer": "\\n\n" * n, "source": "true"}
    for n in range(30)
]
TEXTS = [(row["question"], row["answer"], row["source"]) for row in ROWS]


def read(path):
    return [row for frame in open_source(str(path)).frames(BadRows()) for row in frame.rows()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 2**20])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_an_array_is_read_wherever_its_text_is_cut(tmp_path, monkeypatch, size, form):
    monkeypatch.setattr("data_pipeline.sources.json_array.BLOCK_BYTES", size)
    for text in (json.dumps(ROWS, **form), "\ufeff \n" + json.dumps(ROWS, **form) + " \n"):
        (tmp_path / "a.json").write_text(text)
        assert read(tmp_path) == TEXTS
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    for text in ("[]", " [ ]\n", ""):
        (tmp_path / "a.json").write_text(text)
        assert read(tmp_path) == TEXTS


def test_lines_and_compressed_arrays_are_read(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(tmp_path / "a.json") == TEXTS
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert read(tmp_path / "b.json.gz") == TEXTS


@pytest.mark.parametrize("size", [1, 10, 2**20])
@pytest.mark.parametrize(
    "text", ["[{}", "[{},", "[{},]", "[{} {}]", '[{"a": }]', "[{}] 5", "[{}][{}]", '["a', "[tru]", "[,]", "[{]", "["]
)
def test_what_is_not_an_array_is_named(tmp_path, monkeypatch, size, text):
    monkeypatch.setattr("data_pipeline.sources.json_array.BLOCK_BYTES", size)
    (tmp_path / "bad.json").write_text(text)
    layout = LayoutChoice().resolve(["question", "answer"], "rows")
    with pytest.raises(DataError, match="bad.json is not a valid JSON array after row"):
        list(JsonArrayChunk(tmp_path / "bad.json").frames(layout, BadRows("skip")))


def test_a_fault_is_found_without_reading_the_rest(tmp_path):
    (tmp_path / "bad.json").write_text("[{oops" + " " * 40_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="Expecting property name"):
        read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 2**20])
def test_bad_elements_are_named_or_counted(tmp_path, monkeypatch, size):
    monkeypatch.setattr("data_pipeline.sources.json_array.BLOCK_BYTES", size)
    deep = '{"x": [' * 2000 + "]}" * 2000
    good = f'{{"question": "q", "more": {deep}, "answer": "a"}}'
    twice = '{"question": "q", "x": {"y": 1, "y": 2}, "answer": "a"}'
    (tmp_path / "a.json").write_text(f'[{good}, 5, {twice}, {good}, [1], {{"question": "q"}}]')
    with pytest.raises(DataError, match="a.json, row 2: it is not a JSON object"):
        read(tmp_path)
    bad = BadRows("skip")
    rows = [row[0] for frame in open_source(str(tmp_path)).frames(bad) for row in frame.rows()]
    assert rows == ["q", None, None, "q", None, None]
    assert bad.counts == {"not a JSON object": 2, "a key twice": 1, "no column answer": 1}

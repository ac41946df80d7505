"""Rows that cannot be used: the first ends the job, or all are counted by reason, at their places."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.checking.verification import verify
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.sources.bad_rows import OTHER_REASONS, BadRowError, BadRows, merged
from data_pipeline.sources.hub import HubChunk, hub_chunks
from data_pipeline.sources.layout_choice import LayoutChoice
from data_pipeline.sources.source import open_source

GOOD = b'{"question": "q%d", "answer": "a%d"}'
BAD = {
    b'{"question": "q", ': "not valid JSON",
    b"[1]": "not a JSON object",
    b'{"question": "q", "reply": "a"}': "no column answer",
    b'{"question": "q", "answer": "\\ud800"}': "half a surrogate pair",
    b'{"question": "q", "question": "p", "answer": "a"}': "a key twice",
    b'{"question": "\xff", "answer": "a"}': "not valid JSON",
}


@pytest.fixture
def mixed(tmp_path):
    """A file of 400 lines in several chunks, of which every fifth is bad or blank."""
    lines = [GOOD % (n, n) for n in range(400)]
    kinds = [*BAD, b""]
    for position, number in enumerate(range(0, 400, 5)):
        lines[number] = kinds[position % len(kinds)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    return folder, lines


def test_bad_rows_are_counted_and_keep_their_numbers(mixed, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", 3000)
    folder, lines = mixed
    settings = replace(settings, on_bad_row="skip")
    indexes = [prepare(str(folder), tmp_path / f"{n}", settings, workers=n, progress=n == 1) for n in (1, 2)]
    assert indexes[0] == indexes[1]
    counts, rows = indexes[0]["counts"], [line for line in lines if line]
    bad = [number for number, line in enumerate(rows) if line in BAD]
    assert counts["rows_in"] == len(rows) == counts["documents"] + counts["validation_documents"] + len(bad)
    assert {reason: n for reason, n in counts["rows_dropped"].items() if n} == {"bad_row": len(bad)}
    assert counts["bad_rows"] == {reason: sum(BAD.get(line) == reason for line in lines) for reason in BAD.values()}
    read = ShardFolder(tmp_path / "1")
    numbers = np.concatenate([read.read(row)[1][:, 4] for row in range(read.num_rows)])
    assert set(numbers.tolist()) == set(range(len(rows))) - set(bad)
    verify(tmp_path / "1")
    said = capsys.readouterr().err
    assert f"bad rows skipped, not a JSON object: {counts['bad_rows']['not a JSON object']}, such as " in said
    assert "a.jsonl, line 6: it is not a JSON object, but of type list; " in said


def test_a_job_that_a_bad_row_ended_can_be_continued_without_it(mixed, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", 3000)
    lines = mixed[1]
    (mixed[0] / "a.jsonl").write_bytes(b"\n".join([GOOD % (n, n) for n in range(400)] + lines))
    with pytest.raises(DataError, match="line 401: it is not valid JSON"):
        prepare(str(mixed[0]), tmp_path / "out", settings, workers=1, progress=False)
    skipping = replace(settings, on_bad_row="skip")
    indexes = [prepare(str(mixed[0]), tmp_path / name, skipping, workers=1, progress=False) for name in ("out", "new")]
    assert indexes[0] == indexes[1]


def test_by_default_the_first_bad_row_ends_the_job(mixed, settings, tmp_path):
    with pytest.raises(
        DataError, match="a.jsonl, line 1: it is not valid JSON .*; or skip bad rows with --on-bad-row skip"
    ):
        prepare(str(mixed[0]), tmp_path / "out", settings, workers=1, progress=False)


def test_a_file_without_a_good_row_is_refused(settings, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"[1]\n[2]\n")
    (tmp_path / "b.jsonl").write_bytes(GOOD % (1, 1))
    settings = replace(settings, on_bad_row="skip", tokenizer="train")
    index = prepare(str(tmp_path), tmp_path / ".out", settings, workers=1, progress=False)
    assert index["counts"]["rows_dropped"]["bad_row"] == 2
    with pytest.raises(DataError, match="a.jsonl, line 1: it is not a JSON object, but of type list"):
        prepare(str(tmp_path / "a.jsonl"), tmp_path / ".out2", settings, workers=1, progress=False)


def test_text_that_is_not_utf8_in_a_table_is_a_bad_row(tmp_path):
    texts = pa.array([b"a", b"caf\xe9", b"c", b"\xff", b"e"]).view(pa.string())
    pq.write_table(pa.table({"question": texts, "answer": list("vwxyz")}), tmp_path / "a.parquet", row_group_size=3)
    source, bad = open_source(str(tmp_path)), BadRows("skip")
    rows = [row for frame in source.frames(bad) for row in frame.rows()]
    assert [row[:2] for row in rows] == [("a", "v"), (None, None), ("c", "x"), (None, None), ("e", "z")]
    ((reason, count, examples),) = bad.summary()
    assert (reason, count) == ("text that is not UTF-8", 2)
    assert [example.split(": ")[0].rpartition("/")[2] for example in examples] == [
        "a.parquet, row 2",
        "a.parquet, row 4",
    ]
    with pytest.raises(DataError, match="a.parquet, row 2: it has text that is not UTF-8"):
        list(source.frames(BadRows()))


def test_after_a_network_fault_no_bad_row_is_counted_twice(tmp_path, monkeypatch):
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, (chunk,), layout = hub_chunks(str(tmp_path), LayoutChoice())
    monkeypatch.setattr("data_pipeline.sources.rows.ROWS_PER_FRAME", 4)
    monkeypatch.setattr("data_pipeline.sources.hub.WAITS", (0, 0, 0))
    read_rows, faults = HubChunk._rows, [1, 8, 16]

    def fragile(*arguments):
        for row, where in read_rows(*arguments):
            number = int(row["question"][1:])
            if number in faults:
                faults.remove(number)
                raise ConnectionResetError("the peer has gone")
            yield row if number % 3 else BadRowError("a fault", "it has a fault"), where

    monkeypatch.setattr(HubChunk, "_rows", fragile)
    bad = BadRows("skip")
    prompts = [row[0] for frame in chunk.frames(layout, bad) for row in frame.rows()]
    assert prompts == [f"q{n}" if n % 3 else None for n in range(20)]
    assert bad.counts == {"a fault": 7}


def test_there_are_few_reasons_and_examples_however_many_rows_are_bad():
    bad = BadRows("skip")
    for number in range(1000):
        bad.add(BadRowError(str(number) if number % 2 else "even", "it is bad"), lambda number=number: f"row {number}")
    total = merged([bad.summary(), bad.summary()])
    assert len(total) <= 51 and OTHER_REASONS in [reason for reason, _, _ in total]
    assert sum(count for _, count, _ in total) == 2000
    assert ("even", 1000, [f"row {number}: it is bad" for number in (0, 2, 4)]) in total


def test_a_column_that_is_not_used_may_be_nested_to_any_depth(tmp_path):
    for depth in (90, 5000, 200_000):
        deep = '{"a": [' * depth + "1" + "]}" * depth
        line = f'{{"question": "q[{{", "more": {deep}, "answer": "a \\"}}"}}'
        (tmp_path / "a.jsonl").write_text(line)
        assert [row for frame in open_source(str(tmp_path)).frames(BadRows()) for row in frame.rows()] == [
            ("q[{", 'a "}', "a.jsonl")
        ]
        (tmp_path / "a.jsonl").write_text(line[:-30])
        with pytest.raises(DataError, match="line 1: it is not valid JSON"):
            list(open_source(str(tmp_path)).frames(BadRows()))


@pytest.mark.parametrize("again", ['"question":', '"question" :', '"question"\t:', '"question": '])
def test_a_key_that_occurs_twice_is_found_however_it_is_spaced(tmp_path, again):
    (tmp_path / "a.jsonl").write_text(f'{{"question":"q",{again}"p","answer":"a"}}\n')
    with pytest.raises(DataError, match="a.jsonl, line 1: it has the key question twice"):
        list(open_source(str(tmp_path)).frames(BadRows()))

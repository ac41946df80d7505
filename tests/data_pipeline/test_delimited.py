"""Comma- and tab-separated files: each record is read once wherever a file is cut, and nothing is guessed."""

import csv
import gzip
import io
import random

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.bad_rows import BadRows
from data_pipeline.sources.records import _last_record_end_exactly, last_record_end
from data_pipeline.sources.source import open_source

ROWS = [
    ("q", "a", "s"),
    ("two\nlines\r\n", 'say "yes", or\n""', "s,t"),
    ("NA", "null", "007"),
    ("", "5", "1e3"),
    ("tab\there", " spaces ", "ü"),
] * 40


def write(file, rows=ROWS, header=("question", "answer", "source"), **options):
    text = io.StringIO(newline="")
    delimiter = "\t" if ".tsv" in file.name else ","
    csv.writer(text, delimiter=delimiter, **options).writerows([header, *rows])
    data = text.getvalue().encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def read(source):
    return [row for frame in open_source(str(source)).frames(BadRows()) for row in frame.rows()]


@pytest.mark.parametrize("size", [10, 100, 10**7])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "A.TSV"])
@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}])
def test_texts_come_back_as_they_were_written(tmp_path, monkeypatch, name, size, options):
    monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", size)
    if name == "A.TSV":
        name, file = "A.TSV", tmp_path / "A.TSV"
        write(tmp_path / "a.tsv", **options).rename(file)
    else:
        file = write(tmp_path / name, **options)
    assert read(file) == ROWS
    assert (len(open_source(str(file)).chunks) > 1) == (size < 1000 and not name.endswith(".gz"))


def test_other_columns_orders_and_ends_of_files(tmp_path):
    write(tmp_path / "a.csv", [("x\ny", "a", "1", "q")], ("odd\nname", "answer", "n", "question"))
    assert read(tmp_path / "a.csv") == [("q", "a", "a.csv")]
    (tmp_path / "empty.csv").write_bytes(b"")
    for data, rows in {
        b"question,answer": [],
        b"question,answer\n": [],
        b"\xef\xbb\xbfquestion,answer\r\nq,a": [("q", "a", "a.csv")],
        b"question,answer\nq,a\n\n\nq,\n": [("q", "a", "a.csv"), ("q", "", "a.csv")],
        b'"question","answer"\nq,"a\n"': [("q", "a\n", "a.csv")],
    }.items():
        (tmp_path / "a.csv").write_bytes(data)
        assert read(tmp_path) == rows


def test_a_quote_within_a_value_is_a_character(tmp_path, monkeypatch):
    """Counting quotes alone would cut the file in the wrong places."""
    data = b'question,answer\n5" pipe,a\n"2\n""b""",c"\nd,e\n"f"g"h,i\n' * 1
    rows = [('5" pipe', "a"), ('2\n"b"', 'c"'), ("d", "e"), ('fg"h', "i")]
    (tmp_path / "a.csv").write_bytes(data)
    for size in range(1, len(data) + 1):
        monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", size)
        assert [row[:2] for row in read(tmp_path / "a.csv")] == rows


def test_the_fast_and_the_exact_search_agree_on_what_csv_writes():
    generator = random.Random(3)
    for _ in range(300):
        text = io.StringIO()
        rows = [["".join(generator.choices('ab",\n\r', k=generator.randint(0, 6))) for _ in range(3)] for _ in range(6)]
        csv.writer(text, lineterminator="\n").writerows(rows)
        data = text.getvalue().encode()
        for cut in range(len(data) + 1):
            assert last_record_end(data[:cut], b",") == _last_record_end_exactly(data[:cut], b","), data[:cut]


@pytest.mark.parametrize("size", [10, 10**7])
def test_rows_with_a_wrong_number_of_values_are_named_or_counted(tmp_path, monkeypatch, size):
    monkeypatch.setattr("data_pipeline.sources.chunk.BYTES_PER_CHUNK", size)
    lines = ["question,answer", "q0,a0", "q1", "q2,a2,x", "q3,a3", '"q\n4",a4', "q5,a\xe9", "q6,a6", "q7"]
    (tmp_path / "a.csv").write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv, row 2: it has 1 instead of 2 values \('q1'\); or skip"):
        read(tmp_path)
    bad = BadRows("skip")
    texts = [row[0] for frame in open_source(str(tmp_path)).frames(bad) for row in frame.rows()]
    assert texts == ["q0", None, None, "q3", "q\n4", None, "q6", None]
    assert bad.counts == {"1 instead of 2 values": 2, "3 instead of 2 values": 1, "text that is not UTF-8": 1}
    assert bad.examples["3 instead of 2 values"] == [
        f"{tmp_path}/a.csv, row 3: it has 3 instead of 2 values ('q2,a2,x')"
    ]
    assert bad.examples["text that is not UTF-8"] == [f"{tmp_path}/a.csv, row 6: it has text that is not UTF-8"]
    assert bad.examples["1 instead of 2 values"][-1].startswith(f"{tmp_path}/a.csv, row 8: it has 1")


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_quote_that_nobody_closes_is_an_error(tmp_path, name):
    """pyarrow takes the rest of the file for one value."""
    data = b'question,answer\nq,a\nq,"never closed\nq,a\nq,a\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(
        DataError, match=rf"{name} has a quoted value without an end, which begins with '\"never closed"
    ):
        read(tmp_path / name)


def test_a_missing_column_and_text_that_is_not_utf8_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"q,answer\nx,y\n")
    with pytest.raises(DataError, match="a.csv has the columns q, answer, which fit no layout"):
        read(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"question,answer\nx,y\nx,\xff\n")
    with pytest.raises(DataError, match=f"{tmp_path}/a.csv, row 2: it has text that is not UTF-8"):
        read(tmp_path)


def test_a_record_may_be_longer_than_what_is_parsed_at_a_time(tmp_path):
    long = [("q", "x\n" * 1_500_000, "s"), ("q2", "a", "s")]
    assert read(write(tmp_path / "a.csv", long)) == long
    (tmp_path / "a.csv").write_bytes((tmp_path / "a.csv").read_bytes() + b"bad\r\n")
    with pytest.raises(DataError, match="row 3: it has 1 instead of 3 values"):
        read(tmp_path)

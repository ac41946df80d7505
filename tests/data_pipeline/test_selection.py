"""Which rows a preparation keeps: every reason to drop one, and the two splits."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from data_pipeline.checking.verification import verify
from data_pipeline.deduplication.keys import repeated, row_keys
from data_pipeline.errors import DataError
from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.tokens.encoding import DocumentEncoder
from data_pipeline.tokens.tokenizer import load_tokenizer

SETTINGS = Settings(seq_len=64, rows_per_shard=50, vocab_size=400)
NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
EVALUATION_TEXT = "a train leaves the station at noon and travels north at sixty miles an hour until it arrives"


def rows_of(count):
    """Rows of which no two are alike: random words."""
    generator = np.random.default_rng(0)
    return [
        {
            "question": " ".join(generator.choice(NUMBERS, 12)),
            "answer": " ".join(generator.choice(NUMBERS, 12)),
            "source": s,
        }
        for s in generator.choice(["forum", "exam", "socratic"], count).tolist()
    ]


def run(rows, tmp_path, settings=SETTINGS, name="corpus"):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(str(tmp_path / f"{name}.jsonl"), tmp_path / name, settings, workers=1, progress=False)
    verify(tmp_path / name)
    return ShardFolder(tmp_path / name)


def input_rows(folder):
    """Gives the input rows that a folder holds."""
    spans = [folder.read(row)[1] for row in range(folder.num_rows)]
    return sorted({int(row) for row in np.concatenate(spans)[:, 4]})


def dropped(folder):
    counts = folder.index["counts"]
    assert counts["rows_in"] == counts["documents"] + counts["validation_documents"] + sum(
        counts["rows_dropped"].values()
    )
    return {reason: rows for reason, rows in counts["rows_dropped"].items() if rows}


def test_rows_that_differ_in_case_or_white_space_alone_are_duplicates_and_the_first_stays(tmp_path):
    rows = rows_of(10)
    rows += [{**rows[3], "question": rows[3]["question"].upper().replace(" ", "\n", 2)}]
    rows += [{**rows[3], "answer": "another"}, {**rows[4], "question": rows[4]["question"] + " more"}]
    folder = run(rows, tmp_path)
    assert dropped(folder) == {"duplicate": 1}
    assert input_rows(folder) == [*range(10), 11, 12]


def test_where_the_question_ends_makes_a_difference():
    rows = pl.DataFrame({"question": ["a b", "a", "A B"], "answer": ["c", "b c", "c"]})
    keys, questions = row_keys(rows["question"], rows["answer"])
    assert keys[0].tolist() != keys[1].tolist()
    assert keys[0].tolist() == keys[2].tolist()
    assert questions[0] == questions[2] != questions[1]


def test_repeated_keys_are_found_among_eligible_rows_alone():
    keys = np.array([[1, 2], [1, 3], [2, 2], [1, 2], [1, 2], [2, 2], [1, 2]], dtype=np.uint64)
    eligible = np.array([False, True, True, True, True, True, True])
    assert np.flatnonzero(repeated(keys, eligible)).tolist() == [4, 5, 6]
    assert repeated(keys[:0], eligible[:0]).tolist() == []


def test_sources_can_be_left_out_or_be_the_only_ones(tmp_path):
    rows = rows_of(60)
    count = Counter(row["source"] for row in rows)
    without = run(rows, tmp_path, replace(SETTINGS, exclude_sources=("socratic",)), "without")
    assert dropped(without) == {"excluded_source": count["socratic"]}
    assert without.index["sources"] == list(dict.fromkeys(row["source"] for row in rows if row["source"] != "socratic"))
    only = run(rows, tmp_path, replace(SETTINGS, sources=("exam",)), "only")
    assert dropped(only) == {"excluded_source": count["forum"] + count["socratic"]}
    assert input_rows(only) == [number for number, row in enumerate(rows) if row["source"] == "exam"]
    with pytest.raises(DataError, match="the source exam is both in sources and in exclude_sources"):
        Settings(sources=("exam",), exclude_sources=("exam",))


def test_short_and_long_documents_can_be_dropped(tmp_path):
    rows = [*rows_of(20), {"question": "q", "answer": "a"}, {"question": "one " * 90, "answer": "two " * 50}]
    split = run(rows, tmp_path, name="split")
    assert input_rows(split) == list(range(22))
    folder = run(rows, tmp_path, replace(SETTINGS, minimum_tokens=5, long_documents="drop"), "dropped")
    lengths = np.diff(folder.read(0)[1][:, [0, 2]])
    assert dropped(folder)["too_short"] == 1
    assert dropped(folder)["too_long"] >= 1
    assert lengths.max() <= 64
    assert 20 not in input_rows(folder)
    assert 21 not in input_rows(folder)


def test_near_duplicates_go_when_asked(tmp_path):
    generator = np.random.default_rng(1)
    long_text = " ".join(generator.choice(NUMBERS, 60))
    rows = [*rows_of(10), {"question": "what is it?", "answer": long_text}]
    rows += [{"question": "what is it?", "answer": long_text + " indeed"}]
    assert dropped(run(rows, tmp_path, name="exact")) == {}
    folder = run(rows, tmp_path, replace(SETTINGS, near_duplicates=0.8), "near")
    assert dropped(folder) == {"near_duplicate": 1}
    assert input_rows(folder) == list(range(11))


def test_rows_that_hold_evaluation_texts_go_when_asked(tmp_path):
    rows = [*rows_of(10), {"question": f"Well: {EVALUATION_TEXT.upper()}?", "answer": "at one"}]
    evaluation = tmp_path / "test.jsonl"
    evaluation.write_text(json.dumps({"question": EVALUATION_TEXT, "answer": "42"}) + "\n")
    folder = run(rows, tmp_path, replace(SETTINGS, decontaminate=(str(evaluation),)))
    assert dropped(folder) == {"contaminated": 1}
    assert input_rows(folder) == list(range(10))
    assert str(tmp_path) not in (tmp_path / "corpus" / "index.json").read_text()


def test_no_question_is_in_both_splits_whatever_the_order(tmp_path):
    rows = rows_of(200)
    for number in range(0, 200, 4):  # the same question with another answer
        rows.append(
            {**rows[number], "answer": rows[number]["answer"] + " too", "question": rows[number]["question"].title()}
        )
    settings = replace(SETTINGS, validation_share=0.3)
    folder = run(rows, tmp_path, settings)
    validation = ShardFolder(tmp_path / "corpus" / "validation")
    assert (
        validation.index["counts"]["documents"]
        == folder.index["counts"]["validation_documents"]
        == 250 - len(input_rows(folder))
    )
    held_out = {rows[number]["question"].lower() for number in input_rows(validation)}
    assert 40 <= len(held_out) <= 80
    assert not held_out & {rows[number]["question"].lower() for number in input_rows(folder)}
    assert validation.index["tokenizer"]["fingerprint"] == folder.index["tokenizer"]["fingerprint"]
    backwards = rows[::-1]
    run(backwards, tmp_path, settings, "backwards")
    again = ShardFolder(tmp_path / "backwards" / "validation")
    assert {backwards[number]["question"].lower() for number in input_rows(again)} == held_out


def test_a_fast_encoder_that_errs_is_found_out_and_replaced(led_tokenizer, tmp_path, monkeypatch, capsys):
    rows = rows_of(30)
    settings = replace(SETTINGS, tokenizer=led_tokenizer)
    right = run(rows, tmp_path, settings, "right")
    fast = []

    def wrong(encoder, texts):
        ids, offsets = real(encoder, texts)
        fast.append(len(texts))
        return np.where(np.arange(len(ids)) == 2, ids + 1, ids), offsets

    import data_pipeline.tokens.encoding

    real = data_pipeline.tokens.encoding._encode_fast
    monkeypatch.setattr("data_pipeline.tokens.encoding._encode_fast", wrong)
    (tmp_path / "other.jsonl").write_text((tmp_path / "right.jsonl").read_text())
    prepare(str(tmp_path / "other.jsonl"), tmp_path / "other", settings, workers=1)
    said = capsys.readouterr().err
    assert "gigatoken and the tokenizer differ on" in said
    assert "encoding all rows again with the slower tokenizer" in said
    assert len(fast) == 1  # one column, then never again
    assert [f["sha256"] for f in ShardFolder(tmp_path / "other").index["files"]] == [
        f["sha256"] for f in right.index["files"]
    ]


def test_both_encoders_give_the_same_documents(led_tokenizer, rows, tmp_path):
    load_tokenizer(led_tokenizer).save(tmp_path)
    question, answer = (
        pl.Series([row[name] or "" for row in rows], dtype=pl.String) for name in ("question", "answer")
    )
    fast, slow = (DocumentEncoder(tmp_path, fast=fast).encode(question, answer) for fast in (True, False))
    for mine, others in zip(fast, slow, strict=True):
        assert np.array_equal(mine, others)


def test_a_setting_that_makes_no_sense_is_refused():
    for wrong in (
        {"validation_share": 1.0},
        {"long_documents": "cut"},
        {"near_duplicates": 0.0},
        {"minimum_tokens": 0},
    ):
        ((name, _),) = wrong.items()
        with pytest.raises(DataError, match=name):
            Settings(**wrong)

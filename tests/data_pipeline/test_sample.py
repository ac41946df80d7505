"""The built-in sample corpus: the same everywhere, dirty as announced, and held out honestly."""

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.cleaning.clean import clean
from data_pipeline.sources.sample import clean_rows, held_out_rows, split, training_rows

ROOT = Path(__file__).parents[2]
COLUMNS = ["orig_question", "orig_answer", "question", "answer", "source", "index"]
PRINT_HASH = """
import hashlib, json
from data_pipeline.sources.sample import clean_rows, held_out_rows, training_rows
text = json.dumps([list(training_rows()), clean_rows(), held_out_rows()])
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def training() -> list[dict]:
    return list(training_rows())


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return held_out_rows()


@pytest.fixture(scope="module")
def soiled(training) -> list[tuple[str, str]]:
    """The texts that dirt changed, each with its clean form."""
    pairs = [
        (row[column], clean_row[column])
        for row, clean_row in zip(training, clean_rows(), strict=False)
        for column in ("question", "answer")
    ]
    return [(dirty, text) for dirty, text in pairs if dirty != text]


def _same_question(question: str) -> str:
    return " ".join(question.lower().split())


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_rows_are_the_same_in_every_process(training, held_out, hash_seed):
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    there = subprocess.run(
        [sys.executable, "-c", PRINT_HASH], env=environment, capture_output=True, text=True, check=True
    )
    here = hashlib.sha256(json.dumps([training, clean_rows(), held_out]).encode()).hexdigest()
    assert there.stdout.strip() == here


def test_the_rows_have_the_columns_of_webinstruct(training, held_out):
    for rows in (training, held_out, clean_rows()):
        assert all(list(row) == COLUMNS for row in rows)
        assert [row["index"] for row in rows] == list(range(len(rows)))
        assert {row["source"] for row in rows} == {"mathstackexchange", "stackexchange", "socratic"}
    assert all(row["orig_question"].startswith("<p>") for row in training)


def test_there_are_as_many_rows_as_a_laptop_learns_in_minutes(training, held_out):
    assert 6_000 <= len(training) <= 8_000
    assert 180 <= len(held_out) <= 220
    assert 0.60 <= sum(entry.kind == "known" for entry in split()[1]) / len(held_out) <= 0.72


def test_no_held_out_question_is_asked_in_training(training, held_out):
    asked = {_same_question(row["question"]) for row in training} | {
        _same_question(row["question"]) for row in clean_rows()
    }
    questions = [_same_question(row["question"]) for row in held_out]
    assert asked.isdisjoint(questions)
    assert len(set(questions)) == len(questions)


def test_a_known_held_out_fact_is_asked_in_training_in_other_phrasings_and_its_phrasing_of_other_facts():
    training, held_out = split()
    phrasings_of_fact, facts_of_phrasing = defaultdict(set), defaultdict(set)
    for entry in training:
        phrasings_of_fact[entry.family, entry.fact].add(entry.phrasing)
        facts_of_phrasing[entry.family, entry.phrasing].add(entry.fact)
    for entry in held_out:
        if entry.kind == "known":
            assert len(phrasings_of_fact[entry.family, entry.fact] - {entry.phrasing}) >= 3, entry
        assert len(facts_of_phrasing[entry.family, entry.phrasing] - {entry.fact}) >= 3, entry


def test_the_operands_of_a_new_held_out_question_never_meet_in_training():
    training, held_out = split()
    combinations = {entry.fact.combination for entry in held_out if entry.kind == "new"}
    assert "" not in combinations
    assert combinations.isdisjoint(entry.fact.combination for entry in training)
    # The combinations' names are trusted above; here the numbers themselves speak, in both orders and three operations.
    bonds = {
        "addition": lambda a, b: {a, b},
        "subtraction": lambda a, b: {a - b, b},
        "equations": lambda a, b: {a, b - a},
    }
    met = {
        kind: {
            frozenset(bonds[entry.family](*map(int, entry.fact.slots)))
            for entry in training + held_out
            if entry.family in bonds and (entry.kind == "new") == (kind == "new")
        }
        for kind in ("new", "training")
    }
    assert met["new"] and met["new"].isdisjoint(met["training"])


def test_every_word_of_a_held_out_answer_occurs_in_training_answers(training, held_out):
    words = {word for row in training for word in row["answer"].split()}
    assert all(row["answer"] and set(row["answer"].split()) <= words for row in held_out)


def test_a_fact_has_one_short_answer_in_every_phrasing():
    answers = defaultdict(set)
    for entry in chain(*split()):
        answers[_same_question(entry.question)].add(entry.answer)
        assert 1 <= len(entry.answer.split()) <= 8 and len(entry.question.split()) <= 20, entry
        assert "{" not in entry.question
    assert all(len(found) == 1 for found in answers.values())


def test_held_out_rows_are_clean(held_out):
    frame = pl.DataFrame(held_out)
    assert frame.with_columns(clean(pl.col("question", "answer"))).equals(frame)
    assert all(row["orig_question"] == row["question"] and row["orig_answer"] == row["answer"] for row in held_out)
    assert not any("&#" in row["question"] or "http" in row["question"] for row in held_out)


def test_cleaning_the_training_rows_gives_back_the_clean_rows(training):
    cleaned = (
        pl.DataFrame(training).with_columns(clean(pl.col("question", "answer"))).select("question", "answer").rows()
    )
    truth = [(row["question"], row["answer"]) for row in clean_rows()]
    assert cleaned[: len(truth)] == truth
    assert set(cleaned[len(truth) :]) <= set(truth)


def test_about_a_sixth_of_the_training_rows_are_soiled(training):
    rows = list(zip(training, clean_rows(), strict=False))
    soiled = sum((row["question"], row["answer"]) != (truth["question"], truth["answer"]) for row, truth in rows)
    assert 0.15 <= soiled / len(rows) <= 0.20


@pytest.mark.parametrize(
    "piece",
    [
        "&amp;",
        "&quot;",
        "&#39;",
        "&lt;",
        "&amp;lt;",
        "&nbsp;",
        " https://",
        "(https://",
        "\x07",
        "\x1b",
        "\x7f",
        "\u200b",
        "\u2060",
        "\ufeff",
        "\u00ad",
        "\u00a0",
        "\u0301",
        "  ",
        "   ",
        "\t",
        "\r\n",
    ],
)
def test_every_kind_of_dirt_occurs(soiled, piece):
    assert any(piece in dirty and piece not in text for dirty, text in soiled)


def test_accents_are_composed_once_clean(soiled):
    decomposed = [text for dirty, text in soiled if unicodedata.normalize("NFC", dirty) == text]
    assert decomposed and all(text == unicodedata.normalize("NFC", text) for _, text in soiled)


def test_some_rows_are_repeated_and_some_are_unanswered(training):
    count = len(clean_rows())
    first = Counter((row["question"], row["answer"]) for row in training[:count])
    repeated = [(row["question"], row["answer"]) for row in training[count:]]
    assert max(first.values()) == 1
    assert 0.015 <= len(repeated) / count <= 0.025 and all(pair in first for pair in repeated)
    answers = [row["answer"] for row in training]
    assert "" in answers and any(answer and not answer.strip() for answer in answers)


def test_special_tokens_stand_literally_in_some_rows(training):
    texts = [text for row in training for text in (row["question"], row["answer"])]
    assert all(any(token in text for text in texts) for token in ("<s>", "</s>", "<mask>"))

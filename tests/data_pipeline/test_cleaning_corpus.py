"""A hand-written corpus of true-to-life texts: what cleaning must leave alone, and what it must make of the rest."""

from pathlib import Path

import polars as pl
import pytest
import yaml

from data_pipeline.cleaning.clean import clean, clean_text

CORPUS = Path(__file__).parent / "cleaning_corpus"


def entries() -> list:
    """Read every entry as a parameter: the text, and what cleaning must make of it."""
    found = []
    for path in sorted(CORPUS.glob("*.yaml")):
        for kind, texts in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            for number, entry in enumerate(texts):
                text, expected = entry if isinstance(entry, list) else (entry, entry)
                found.append(pytest.param(text, expected, id=f"{path.stem}-{kind}-{number}"))
    return found


ENTRIES = entries()


@pytest.mark.parametrize(("text", "expected"), ENTRIES)
def test_text_becomes(text, expected):
    assert clean_text(text) == expected
    assert clean_text(expected) == expected


def test_the_corpus_is_large():
    assert len(ENTRIES) >= 300


def test_a_column_of_all_texts_is_cleaned_as_one_by_one():
    texts, expected = zip(*(entry.values for entry in ENTRIES), strict=True)
    assert pl.DataFrame({"text": texts}).select(clean(pl.col("text")))["text"].to_list() == list(expected)

"""A small dirty corpus, prepared once with a tokenizer trained on it."""

import json
import random
from pathlib import Path

import pytest

from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings

SETTINGS = Settings(seq_len=64, rows_per_shard=20, vocab_size=400)
WORDS = ["the", "sum", "of", "two", "numbers", "is", "greater", "than", "water", "boils", "at", "hundred", "degrees"]
DIRT = ["&amp;lt;b&gt;", "\u200b", " \u00a0 ", "cafe\u0301", "\r\n\r\n\r\n", "(https://example.org)"]
DIRT += ["<s>", "</s>", "<mask>", "<sep>", "$x^2 < y_{1}$", "x²"]  # and what must stay
LED_TOKENIZER = Path(__file__).parents[3] / "shared" / "data" / "led_tokenizer"


def corpus_rows() -> list[dict]:
    """420 rows, among them long ones, dirt of every kind, 20 exact duplicates and 3 without an answer or a question."""
    generator = random.Random(7)

    def text(words: int) -> str:
        return " ".join(generator.choice(DIRT if generator.random() < 0.2 else WORDS) for _ in range(words))

    rows = []
    for number in range(397):
        lengths = (60, 90) if number % 20 == 0 else (generator.randint(3, 12), generator.randint(1, 12))
        question, answer = (text(words) for words in lengths)
        rows.append({"question": f"{number}: {question}", "answer": f"{answer} {number}", "source": f"s{number % 3}"})
    rows += [dict(row) for row in rows[:20]]
    for question, answer in (("why?", ""), (" \u200b", "so"), ("why not?", None)):
        rows.append({"question": question, "answer": answer, "source": "s0"})
    return rows


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return corpus_rows()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, rows) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(str(corpus), out, SETTINGS, workers=1, progress=False)
    return out


@pytest.fixture(scope="session")
def settings() -> Settings:
    return SETTINGS


@pytest.fixture(scope="session")
def led_tokenizer() -> str:
    if not LED_TOKENIZER.is_dir():
        pytest.skip(f"the LED tokenizer is not at {LED_TOKENIZER}")
    return str(LED_TOKENIZER)

"""The quality benchmark runs on made-up text. It is started only by hand, so without this test a fault goes unnoticed."""

import numpy as np
import polars as pl
import pytest

from tests.benchmarks import quality_data
from tests.benchmarks.quality import Run, sweep_table, train
from tests.benchmarks.quality_data import TOKENS_PER_STEP, prepare_corpus

ROWS, WORDS_PER_ROW = 4000, 100  # one question in forty is held out


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    generator = np.random.default_rng(0)
    letters = generator.choice(list("abcdefghijklmnoprstuvw"), (4000, 6))
    words = np.array(["".join(word[: 3 + number % 4]) for number, word in enumerate(letters)])
    texts = [" ".join(row) for row in words[generator.integers(len(words), size=(ROWS, WORDS_PER_ROW))]]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pl.DataFrame(
        {"question": [f"{number} {text[:40]}" for number, text in enumerate(texts)], "answer": texts}
    ).write_parquet(path)
    return path


@pytest.mark.slow
def test_both_models_train_and_are_measured(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(quality_data, "FIRST_VALIDATION_ROW", 0)
    monkeypatch.setattr(quality_data, "VALIDATION_ROWS", 20)
    prepare_corpus(str(rows), tmp_path)
    results = {}
    for model in ("tiny", "lfm2moe"):
        run = Run(model, learning_rate=4e-3, seed=0, tokens=TOKENS_PER_STEP)
        results[model] = [train(run, tmp_path)]
        assert results[model][0]["trained_tokens"] == run.tokens
        assert 1 < results[model][0]["bits_per_byte"] < 10
    _, _, row = sweep_table(results, {})[:3]
    assert row.count("|") == 4

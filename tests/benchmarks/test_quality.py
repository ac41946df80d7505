"""The quality benchmark still runs, on made-up text: its figures are asked for by hand, and nobody notices when it breaks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

ROWS, WORDS_PER_ROW = 45_000, 200  # one question in forty is held out, and more than 400 packed rows of them are needed


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
def test_a_sweep_trains_both_models_at_every_rate(rows, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.quality", "--data", rows, "--out", tmp_path / "out", "--only", "sweep",
         "--sweep-tokens", "4096"],
        capture_output=True, text=True, timeout=400, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    table = [
        line.split("|") for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("|")
    ]
    figures = [float(cell) for row in table[2:] for cell in row[1:-1]]
    assert len(figures) == 3 * 4
    assert all(np.isfinite(figures))

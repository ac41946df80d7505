"""Time and memory are linear in the length: the measurements of `python -m tests.benchmarks.linear` at smaller sizes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.benchmarks.linear import (
    ENVIRONMENT,
    LED_VOCABULARY,
    forward_and_backward,
    liquid_layer,
    peak_bytes,
    tiny_model,
    training_step,
)

PROJECT = Path(__file__).parents[2]
STEP_TOKENS, CHUNK_TOKENS = 1024, 256  # a quarter; the benchmark's chunks of 1,024 in 8,192 tokens are an eighth


@pytest.fixture(scope="module")
def layer():
    layer = liquid_layer()
    forward_and_backward(layer, 1024)  # allocates the gradients and the libraries' buffers
    return layer


def test_four_times_the_tokens_take_four_times_the_memory(layer):
    short, long = (peak_bytes(partial(forward_and_backward, layer, tokens)) for tokens in (2048, 8192))
    assert 3.5 < long / short <= 4.6  # below 3.5 the measurement would miss the part that grows


def test_the_chunked_loss_needs_a_third_of_the_memory_for_the_same_gradients(monkeypatch):
    monkeypatch.setattr("model.loss.CHUNK_TOKENS", CHUNK_TOKENS)
    ids = torch.randint(4, LED_VOCABULARY, (1, STEP_TOKENS), generator=torch.Generator().manual_seed(0))

    def measured(plain: bool) -> tuple[int, dict[str, torch.Tensor]]:
        model, gradients = tiny_model(STEP_TOKENS, recompute=True), {}
        return peak_bytes(lambda: gradients.update(training_step(model, ids, plain))), gradients

    (chunked_peak, chunked), (plain_peak, plain) = measured(plain=False), measured(plain=True)
    assert plain_peak >= 3 * chunked_peak
    assert chunked.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(chunked[name], expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_sixteen_times_the_tokens_take_at_most_eighteen_times_the_time():
    measure = "from tests.benchmarks.linear import time_growth; print(time_growth(1024, 16384, repeats=4))"
    child = subprocess.run(
        [sys.executable, "-c", measure], cwd=PROJECT, env={**os.environ, **ENVIRONMENT}, text=True,
        stdout=subprocess.PIPE, timeout=500, check=True,
    )  # fmt: skip
    assert float(child.stdout) <= 18

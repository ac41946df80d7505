"""A small model with every part; its weights are far enough from zero that every path affects the output."""

import pytest
import torch

from model import LiquidConfig, LiquidForCausalLM
from tests.small_model import SIZES as SMALL

SIZES = SMALL | {"vocab_size": 128, "used_vocab_size": 101, "sliding_window": 8, "memory_every": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: at these sizes a second one only slows tests down, most of all on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config() -> LiquidConfig:
    return LiquidConfig(**SIZES)


@pytest.fixture
def model(config) -> LiquidForCausalLM:
    torch.manual_seed(0)
    model = LiquidForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(4, 101, (3, 50), generator=torch.Generator().manual_seed(1))

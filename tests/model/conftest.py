"""A model small enough for a test and with every part, its weights far enough from zero that every path matters."""

import pytest
import torch

from model import LiquidConfig, LiquidForCausalLM

SIZES = {
    "vocab_size": 128,
    "used_vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "deformable_taps": 3,
    "deformable_range": 6,
    "deformable_groups": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "memory_hidden_size": 12,
    "memory_num_layers": 2,
    "memory_stride": 4,
    "memory_every": 1,
    "embedding_components": 16,
    "embedding_temperature": 1.0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread only costs at these sizes, and much where tests share their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
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

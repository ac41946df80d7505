"""Every implementation of the local attention matches its definition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache

from model import LiquidConfig, LiquidForCausalLM
from model.attention import block_local_attention, local_mask
from model.configuration import BLOCK_LOCAL
from model.documents import Documents


def documents_of(*rows: list[int]) -> Documents:
    return Documents.from_positions(torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]))


def config_with(window: int) -> LiquidConfig:
    return LiquidConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, sliding_window=window)


def windowed(documents: Documents, window: int) -> torch.Tensor:
    """Return which tokens see which by the definition of the window, bool `[B, 1, T, T]`."""
    index = torch.arange(documents.number.shape[1])
    distance = index.unsqueeze(1) - index
    same = documents.number.unsqueeze(2) == documents.number.unsqueeze(1)
    return (same & (distance >= 0) & (distance < window)).unsqueeze(1)


@pytest.mark.parametrize(("tokens", "window"), [(5, 8), (8, 8), (9, 8), (37, 8), (64, 16), (33, 2)])
def test_block_local_attention_is_full_attention_under_the_window_mask(tokens, window):
    torch.manual_seed(0)
    query = torch.randn(2, 6, tokens, 4, requires_grad=True)
    key, value = (torch.randn(2, 2, tokens, 4, requires_grad=True) for _ in range(2))
    documents = documents_of([tokens // 3, tokens - tokens // 3], [tokens])
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=windowed(documents, window), enable_gqa=True, scale=0.5
    )
    mask = local_mask(config_with(window), torch.empty(2, tokens, 24), documents, None)
    given, _ = block_local_attention(None, query, key, value, mask, scaling=0.5, sliding_window=window)
    given = given.transpose(1, 2)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    weights, inputs = torch.randn_like(expected), (query, key, value)
    for ours, plain in zip(
        torch.autograd.grad((given * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_the_size_of_the_mask_is_linear_in_the_length():
    window = 8
    sizes = [
        local_mask(config_with(window), torch.empty(1, tokens, 24), documents_of([tokens]), None).numel()
        for tokens in (1024, 4096)
    ]
    assert sizes[1] == 4 * sizes[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_transformers_own_attention_functions_give_the_same_logits(config, model, ids, implementation):
    """Packed, padded and with a cache. flex attention is not compiled: the code of torch 2.13 for CPUs does not build."""
    other = LiquidForCausalLM._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    other.load_state_dict(model.state_dict())
    assert (model.config._attn_implementation, other.config._attn_implementation) == (BLOCK_LOCAL, implementation)
    packed = torch.cat([torch.arange(n) for n in (13, 29, 8)]).expand(3, 50)
    padded = torch.ones_like(ids)
    padded[0, :11] = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for inputs in ({"position_ids": packed}, {"attention_mask": padded}):
            torch.testing.assert_close(other(ids, **inputs).logits, model(ids, **inputs).logits, atol=1e-4, rtol=1e-4)
        caches = [DynamicCache(config=config) for _ in range(2)]
        for part in ids.split([20, 1, 29], dim=1):
            given, expected = (m(part, past_key_values=c).logits for m, c in zip((other, model), caches, strict=True))
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_an_attention_function_that_cannot_keep_documents_apart_is_refused(config):
    with pytest.raises(ValueError, match="[Ff]lash"):
        LiquidForCausalLM._from_config(copy.deepcopy(config), attn_implementation="flash_attention_2")


@pytest.mark.gpu
def test_flex_attention_in_training_matches_the_blocks_with_gradients():
    """On CUDA the default mask is flex attention's if gradients are needed, and the blocks' otherwise."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    config = LiquidConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, sliding_window=128)
    documents = documents_of([300, 724], [1024])
    documents = Documents.from_positions(documents.positions.cuda())
    query = torch.randn(2, 8, 1024, 32, device="cuda", requires_grad=True)
    key, value = (torch.randn(2, 2, 1024, 32, device="cuda", requires_grad=True) for _ in range(2))
    hidden, module = torch.empty(2, 1024, 256, device="cuda"), torch.nn.Module().train()
    with torch.no_grad():
        blocks = local_mask(config, hidden, documents, None)
    masks = {torch.Tensor: blocks, BlockMask: local_mask(config, hidden, documents, None)}
    results = []
    for kind, mask in masks.items():
        assert isinstance(mask, kind)
        attended, _ = block_local_attention(module, query, key, value, mask, scaling=0.2, sliding_window=128)
        results.append((attended, *torch.autograd.grad(attended.square().sum(), (query, key, value))))
    for blocks_result, flex_result in zip(*results, strict=True):
        torch.testing.assert_close(flex_result, blocks_result, atol=2e-2, rtol=2e-2)  # TF32 in the kernel

"""The balancing bias evens out the experts' load without changing their weights; all expert implementations agree."""

import pytest
import torch

from model import LiquidForCausalLM
from model.metrics import load_max_over_mean, routing_statistics
from model.moe import (
    Experts,
    Router,
    balancing_bias,
    choose_experts,
    set_balancing_bias,
    updated_balancing_bias,
)


@pytest.fixture
def router(config) -> Router:
    """A router that prefers the first expert."""
    torch.manual_seed(0)
    router = Router(config)
    torch.nn.init.normal_(router.gate.weight, std=0.1)
    router.gate.weight.data[0] += 0.05
    return router


def count(experts: torch.Tensor, number: int) -> torch.Tensor:
    return experts.flatten().bincount(minlength=number).double()


def test_the_bias_rises_for_experts_below_the_mean_load_and_keeps_its_sum():
    bias = torch.tensor([[0.1, -0.1, 0.2, -0.2]]).repeat(3, 1)
    load = torch.tensor([[10.0, 2, 4, 4], [5, 5, 5, 5], [0, 0, 0, 0]])
    updated = updated_balancing_bias(bias, load, 0.01)
    torch.testing.assert_close(updated[0] - bias[0], 0.01 * torch.tensor([-1.5, 0.5, 0.5, 0.5]))
    assert torch.equal(updated[1:], bias[1:])  # already balanced; no tokens
    assert torch.equal(updated_balancing_bias(bias, load, 0.0), bias)


def test_the_bias_stays_centred_over_many_steps():
    bias = torch.zeros(2, 8)
    for _ in range(2000):
        bias = updated_balancing_bias(bias, torch.randint(0, 9, (2, 8)).float(), 1e-3)
    assert bias.abs().max() > 0.01
    assert bias.mean(-1).abs().max() < 1e-6


@torch.no_grad()
def test_the_bias_balances_a_skewed_router(router, config):
    tokens = torch.randn(2000, config.hidden_size) + 0.5
    imbalances = []
    for _ in range(200):
        experts, _ = router(tokens)
        load = count(experts, config.num_experts)
        imbalances.append(load_max_over_mean(load).item())
        router.e_score_correction_bias.copy_(updated_balancing_bias(router.e_score_correction_bias, load, 2e-3))
    assert imbalances[0] > 1.5
    assert max(imbalances[-20:]) < 1.1


@torch.no_grad()
def test_the_bias_changes_which_experts_are_chosen_but_not_their_weights(router, config):
    tokens = torch.randn(100, config.hidden_size)
    router.e_score_correction_bias.copy_(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
    experts, weights = router(tokens)
    assert torch.equal(experts.sort().values, torch.tensor([2, 3]).expand(100, 2))
    probabilities = router.gate(tokens).softmax(-1).gather(-1, experts)
    torch.testing.assert_close(weights, probabilities / probabilities.sum(-1, keepdim=True))


def test_the_load_counts_the_biased_choices_of_text_only(config):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 20, 4)
    bias = 0.2 * torch.randn(2, 4)
    text = torch.rand(3, 20) < 0.6
    statistics = routing_statistics(logits, torch.rand(3, 20), text, 2, bias)
    for layer in range(2):
        chosen = [choose_experts(row.softmax(-1), bias[layer], 2) for row in logits[layer][text]]
        assert torch.equal(statistics["load"][layer].double(), count(torch.cat(chosen), 4))
    assert (statistics["load"].sum(-1) == 2 * text.sum()).all()
    unbiased = routing_statistics(logits, torch.rand(3, 20), text, 2, torch.zeros(2, 4))
    assert not torch.equal(unbiased["load"], statistics["load"])
    assert torch.equal(unbiased["routing"], statistics["routing"])


def test_the_models_load_counts_its_routers_choices(model, ids):
    set_balancing_bias(model, 0.2 * torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    chosen = []
    for layer in model.model.layers:
        layer.moe.router.register_forward_hook(lambda _, inputs, output: chosen.append(output[0]))
    load = model(ids, labels=ids).statistics["load"]
    assert torch.equal(load.double(), torch.stack([count(experts, 4) for experts in chosen]))


def test_the_bias_is_saved_and_loaded_in_fp32(model, tmp_path):
    bias = 0.1 * torch.randn(2, 4)
    set_balancing_bias(model, bias)
    assert torch.equal(balancing_bias(model), bias)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = LiquidForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.model.layers[0].moe.router.gate.weight.dtype == dtype
        assert torch.equal(balancing_bias(loaded), bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_bias_in_fp32(model, ids, dtype, tmp_path):
    """Loading in that dtype does the same, so a cast model and a loaded one choose the same experts."""
    bias = torch.tensor([[0.1000, 0.1001, 0.1002, 0.1003]]).repeat(2, 1)
    set_balancing_bias(model, bias)
    model.save_pretrained(tmp_path)
    model.to(dtype)
    assert model.model.layers[0].moe.router.gate.weight.dtype == dtype
    assert torch.equal(balancing_bias(model), bias)
    loaded = LiquidForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_the_bias_moves_with_the_model(router):
    before = router.e_score_correction_bias
    assert router.to("meta", torch.bfloat16).e_score_correction_bias.device.type == "meta"
    emptied = router.to_empty(device="cpu").e_score_correction_bias
    assert (emptied.device.type, emptied.dtype, emptied.shape) == ("cpu", torch.float32, before.shape)
    assert list(router._buffers) == ["e_score_correction_bias"]


def test_a_new_model_begins_without_a_bias(config):
    assert torch.equal(balancing_bias(LiquidForCausalLM(config)), torch.zeros(2, 4))


def test_every_implementation_of_the_experts_gives_the_same_output_and_gradients(config):
    """Expert 0 gets no token."""
    torch.manual_seed(0)
    experts = Experts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(50, config.hidden_size, requires_grad=True)
    chosen = torch.stack([torch.randperm(3)[:2] + 1 for _ in range(50)])
    weights = torch.rand(50, 2, requires_grad=True)
    target = torch.randn(50, config.hidden_size)
    results = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        experts.config = type(config)(**{**config.to_dict(), "experts_implementation": implementation})
        output = experts(tokens, chosen, weights)
        inputs = (tokens, weights, *experts.parameters())
        results.append((output, *torch.autograd.grad((output * target).sum(), inputs)))
    for other in results[1:]:
        for given, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_implementation_is_chosen_as_in_any_transformers_model(config, ids):
    model = LiquidForCausalLM(config).eval()
    assert model.config._experts_implementation == "grouped_mm"
    expected = model(ids).logits
    for implementation in ("batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_of_padding_alone_counts_nothing():
    """The rows of a skipped bad shard make such a micro-batch."""
    nothing = torch.zeros(3, 20, dtype=torch.bool)
    statistics = routing_statistics(torch.randn(2, 3, 20, 4), torch.rand(3, 20), nothing, 2, torch.zeros(2, 4))
    assert statistics["load"].shape == statistics["routing"].shape == (2, 4)
    assert not any(value.any() for value in statistics.values())

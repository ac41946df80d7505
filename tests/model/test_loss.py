"""The loss terms are sums over tokens with the right values and the right gradients."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.loss import (
    PER_SUPERVISED_TOKEN,
    PER_TOKEN,
    LossWeights,
    RunningMeans,
    language_loss_sums,
    regularisation_sums,
    total_loss,
)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 9, (3, 12))
    labels[0, :5] = -100
    labels[2] = -100
    return torch.randn(3, 12, 9), labels


def test_cross_entropy_and_focal_are_their_definitions(batch):
    logits, labels = batch
    sums = language_loss_sums(logits, labels, torch.nn.Identity(), focal_gamma=2.0)
    entropy = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(sums["cross_entropy"], entropy.sum())
    torch.testing.assert_close(sums["focal"], ((1 - torch.exp(-entropy)) ** 2 * entropy).sum())


def test_terms_add_up_however_a_batch_is_split(batch):
    logits, labels = batch
    whole = language_loss_sums(logits, labels, torch.nn.Identity(), 2.0)
    parts = [language_loss_sums(logits[r : r + 1], labels[r : r + 1], torch.nn.Identity(), 2.0) for r in range(3)]
    for term, value in whole.items():
        torch.testing.assert_close(sum(part[term] for part in parts), value)


def test_chunks_give_the_same_sums_and_gradients_with_a_fraction_of_the_logits():
    torch.manual_seed(0)
    hidden = torch.randn(2, 101, 16, requires_grad=True)
    head = torch.nn.Linear(16, 50, bias=False)
    labels = torch.randint(0, 50, (2, 101))
    labels[0, 20:90] = -100
    seen, results = [], []
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for chunk_tokens in (1000, 30):
        seen.clear()
        sums = language_loss_sums(hidden, labels, head, 2.0, chunk_tokens)
        results.append((*sums.values(), *torch.autograd.grad(sum(sums.values()), (hidden, head.weight))))
    assert max(seen) <= 30
    assert len(seen) == 2 * 7  # once in the forward pass and once in the backward pass
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-5)


def regularised(router_logits, ratio, means):
    text = torch.ones(2, 7, dtype=torch.bool)
    return regularisation_sums(router_logits, torch.zeros(2, 7), ratio, text, means, target_ratio=0.6)


def test_expanded_terms_have_the_exact_value_and_gradient_at_the_expansion_point():
    torch.manual_seed(0)
    router_logits = torch.randn(2, 2, 7, 4, requires_grad=True)  # [L, B, T, E]
    ratio = torch.rand(2, 7, requires_grad=True)
    used = router_logits.softmax(-1).mean((1, 2))
    usage = (used * torch.log(4 * used)).sum(-1).mean()
    budget = (ratio.mean() - 0.6) ** 2
    sums = regularised(router_logits, ratio, RunningMeans(used.detach(), ratio.mean().detach()))
    torch.testing.assert_close(sums["expert_usage"] / 14, usage)
    torch.testing.assert_close(sums["budget"] / 14, budget)
    for ours, exact, variable in ((sums["expert_usage"], usage, router_logits), (sums["budget"], budget, ratio)):
        (given,), (expected,) = torch.autograd.grad(ours / 14, variable), torch.autograd.grad(exact, variable)
        torch.testing.assert_close(given, expected)


def test_the_usage_term_moves_routing_towards_equal_use():
    router_logits = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 2, 7, 4).clone().requires_grad_()
    means = RunningMeans(router_logits.detach().softmax(-1).mean((1, 2)), torch.tensor(0.6))
    (gradient,) = torch.autograd.grad(
        regularised(router_logits, torch.rand(2, 7), means)["expert_usage"], router_logits
    )
    assert (gradient[..., 0] > 0).all()  # descent lowers the favourite
    assert (gradient[..., 1:] < 0).all()


def test_padding_adds_nothing():
    torch.manual_seed(0)
    router_logits, error, ratio = torch.randn(2, 2, 7, 4), torch.rand(2, 7), torch.rand(2, 7)
    text = torch.ones(2, 7, dtype=torch.bool)
    text[:, 4:] = False
    means = RunningMeans(torch.full((2, 4), 0.25), torch.tensor(0.5))
    sums = regularisation_sums(router_logits, error, ratio, text, means, 0.6)
    cut = regularisation_sums(router_logits[:, :, :4], error[:, :4], ratio[:, :4], text[:, :4], means, 0.6)
    assert all(torch.equal(sums[term], cut[term]) for term in sums)


def test_every_term_but_the_cross_entropy_has_a_weight_of_its_name():
    weights = {field.name for field in dataclasses.fields(LossWeights)} - {"focal_gamma"}
    assert {"cross_entropy"} | weights == {*PER_SUPERVISED_TOKEN, *PER_TOKEN}


def test_a_term_that_is_registered_is_part_of_the_loss(monkeypatch):
    monkeypatch.setitem(
        PER_TOKEN, "length", lambda figures: figures.retained_ratio.new_tensor(len(figures.retained_ratio))
    )
    text = torch.ones(2, 7, dtype=torch.bool)
    text[0, 3:] = False
    means = RunningMeans(torch.full((2, 4), 0.25), torch.tensor(0.5))
    sums = regularisation_sums(torch.randn(2, 2, 7, 4), torch.rand(2, 7), torch.rand(2, 7), text, means, 0.6)
    weights = LossWeights(*[0.0] * 6)
    weights.length = 0.5
    language = dict.fromkeys(PER_SUPERVISED_TOKEN, torch.tensor(0.0))
    assert total_loss(language | sums, weights, supervised=1, tokens=10) == pytest.approx(0.5 * 10 / 10)


def test_the_total_is_the_weighted_sum_of_means():
    terms = ("cross_entropy", "focal", "reconstruction", "budget", "expert_usage", "z_loss")
    sums = {term: torch.tensor(float(number)) for number, term in enumerate(terms, start=1)}
    weights = LossWeights(focal=0.5, reconstruction=0.1, budget=0.2, expert_usage=0.3, z_loss=0.4)
    expected = (1 + 0.5 * 2) / 10 + (0.1 * 3 + 0.2 * 4 + 0.3 * 5 + 0.4 * 6) / 20
    torch.testing.assert_close(
        total_loss(sums, weights, torch.tensor(10.0), torch.tensor(20.0)), torch.tensor(expected)
    )


def test_running_means_begin_without_a_gradient_and_follow_the_batches():
    means = RunningMeans.initial(layers=2, experts=4, target_ratio=0.6)
    router_logits = torch.randn(2, 2, 7, 4, requires_grad=True)
    sums = regularised(router_logits, torch.rand(2, 7), means)
    (gradient,) = torch.autograd.grad(sums["expert_usage"], router_logits)
    assert torch.allclose(gradient, torch.zeros(()), atol=1e-6)
    later = means.updated(torch.eye(2, 4), torch.tensor(1.0), decay=0.5)
    torch.testing.assert_close(later.routing[0], torch.tensor([0.625, 0.125, 0.125, 0.125]))
    torch.testing.assert_close(later.retained_ratio, torch.tensor(0.8))


def test_a_batch_that_was_not_finite_leaves_the_means_alone():
    means = RunningMeans.initial(layers=2, experts=4, target_ratio=0.6)
    for routing, ratio in ((torch.full((2, 4), float("nan")), 0.5), (torch.eye(2, 4), float("inf"))):
        assert means.updated(routing, torch.tensor(ratio)) is means


def test_an_expert_that_was_never_used_gets_a_gradient_that_raises_its_use():
    router_logits = torch.randn(1, 2, 7, 4, requires_grad=True)
    never = RunningMeans(torch.tensor([[0.0, 0.3, 0.3, 0.4]]), torch.tensor(0.6))
    (gradient,) = torch.autograd.grad(
        regularised(router_logits, torch.rand(2, 7), never)["expert_usage"], router_logits
    )
    assert gradient.isfinite().all()
    assert (gradient[..., 0] < 0).all()  # descent raises it


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_terms_gradient_is_finite_if_a_prediction_is_certain(gamma):
    logits = torch.zeros(1, 3, 5)
    logits[..., 1] = 200.0
    logits.requires_grad_()
    language_loss_sums(logits, torch.tensor([[-100, 1, 2]]), torch.nn.Identity(), gamma)["focal"].backward()
    assert logits.grad.isfinite().all()

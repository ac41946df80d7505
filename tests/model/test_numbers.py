"""Half precision stays finite and close to fp32; a value that is not finite makes the loss not finite."""

from collections.abc import Iterator

import pytest
import torch

from model import LiquidForCausalLM
from model.loss import language_loss_sums

LARGE = 1e4  # its square, 1e8, is far beyond fp16's largest number, 65,504
HALVES = [torch.float16, torch.bfloat16]


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield all floating-point tensors in a module's output."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def outputs_of_modules(model: torch.nn.Module, **inputs) -> dict[str, list[torch.Tensor]]:
    """Run the model and return each module's output tensors by its name, in the order in which the modules ran."""
    outputs = {}

    def keep(name: str):
        def hook(module, arguments, output):
            outputs[name] = list(tensors_in(output))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def modules_with_an_overflow(model: torch.nn.Module, **inputs) -> list[str]:
    """Run the model and return the names of modules whose output is not finite."""
    outputs = outputs_of_modules(model, **inputs)
    return [name for name, tensors in outputs.items() if not all(tensor.isfinite().all() for tensor in tensors)]


def enlarge_stream(model: LiquidForCausalLM) -> None:
    """Make the residual stream begin with a root mean square of `LARGE` at every token."""

    def hook(module, arguments, output):
        hidden = output[0].float()
        large = LARGE * hidden * hidden.square().mean(-1, keepdim=True).rsqrt()
        return (large.to(output[0].dtype), *output[1:])

    model.model.liquid_embedding.register_forward_hook(hook)


def enlarge_router_logits(model: LiquidForCausalLM, ids: torch.Tensor, size: float) -> None:
    """Scale every gate so that its largest logit is `size` or more."""
    with torch.no_grad():
        largest = model.model(ids).router_logits.abs().amax((1, 2, 3))
        for layer, before in zip(model.model.layers, largest, strict=True):
            layer.moe.router.gate.weight.mul_(1.5 * size / before)


def gradients_of_all_parameters(model: LiquidForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_logits_have_the_models_precision_and_losses_are_summed_in_fp32(model, ids, dtype):
    model.to(dtype)
    output, inner = model(ids, labels=ids), model.model(ids)
    assert output.logits.dtype == inner.last_hidden_state.dtype == inner.router_logits.dtype == dtype
    in_fp32 = (output.loss, *output.loss_sums.values(), *output.statistics.values())
    assert {tensor.dtype for tensor in in_fp32} == {torch.float32}
    assert {inner.reconstruction_error.dtype, inner.retained_ratio.dtype} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in (output.logits, *in_fp32))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1e-3, 1.0, LARGE])
def test_a_norm_of_large_or_small_activations_is_that_of_fp32(dtype, tolerance, size):
    norm = torch.nn.RMSNorm(64, eps=1e-5)
    hidden = (torch.randn(8, 64) * size).to(dtype)
    expected = norm(hidden.float())
    halved = hidden.clone().requires_grad_()
    given = norm.to(dtype)(halved)
    torch.testing.assert_close(given.float(), expected, atol=tolerance, rtol=tolerance)
    given.square().sum().backward()
    assert halved.grad.isfinite().all() and norm.weight.grad.isfinite().all()


@torch.no_grad()
def test_a_large_residual_stream_overflows_in_no_part_of_the_model_in_fp16(model, ids):
    enlarge_stream(model)
    assert modules_with_an_overflow(model.half(), input_ids=ids, labels=ids) == []
    assert model.model(ids).last_hidden_state.abs().max() < 20  # the last norm has removed the scale


@torch.no_grad()
def test_a_large_residual_stream_gives_the_same_results_in_fp16_and_fp32(model, ids):
    enlarge_stream(model)
    expected, expected_loss = outputs_of_modules(model, input_ids=ids), model(ids, labels=ids).loss
    model.half()
    given, given_loss = outputs_of_modules(model, input_ids=ids), model(ids, labels=ids).loss
    # Experts are left out: if two have nearly the same score, rounding may choose the other one.
    parts = ("attention", "convolution", "memory", "gate", "_norm", "lm_head")
    compared = [name for name in expected if name.endswith(parts)]
    assert len(compared) > 20
    for name in compared:
        close = {"atol": 2e-2, "rtol": 2e-2, "msg": name}
        torch.testing.assert_close(given[name][0].float(), expected[name][0], **close)
    torch.testing.assert_close(given_loss, expected_loss, atol=0, rtol=2e-3)


def test_a_large_residual_stream_has_finite_gradients_in_fp16(model, ids):
    enlarge_stream(model)
    gradients = gradients_of_all_parameters(model.half(), ids)
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert gradients["model.norm.weight"].abs().max() > 0


@torch.no_grad()
def test_token_embeddings_ten_thousand_times_larger_overflow_in_no_part_of_the_model_in_fp16(model, ids):
    model.model.embed_tokens.weight.mul_(10_000)
    model.half()
    assert model.model.embed_tokens(ids).abs().max() > 2000
    assert modules_with_an_overflow(model, input_ids=ids, labels=ids) == []


@torch.no_grad()
def test_attention_logits_of_ten_thousand_have_a_finite_softmax_in_fp16(model, ids):
    for layer in model.model.layers:
        attention = layer.attention
        # For queries and for keys. The attention logits are sqrt(head_dim) times the product of both gains.
        gain = (LARGE * attention.head_dim**-0.5) ** 0.5
        attention.q_norm.weight.fill_(gain)
        attention.k_norm.weight.fill_(gain)
    assert modules_with_an_overflow(model.half(), input_ids=ids, labels=ids) == []


# With logits of ten thousand the penalty is 10,000 times the loss. In fp16 its gradient may overflow, and the loss scale
# takes care of that; so fp16's gradients are tested with smaller logits.
@pytest.mark.parametrize(("dtype", "trained_size"), [(torch.float32, LARGE), (torch.float16, LARGE / 10)])
def test_router_logits_of_ten_thousand_give_finite_choices_and_penalties(model, ids, dtype, trained_size):
    enlarge_router_logits(model, ids, LARGE)
    model.to(dtype)
    assert modules_with_an_overflow(model, input_ids=ids, labels=ids) == []
    output = model(ids, labels=ids)
    assert model.model(ids).router_logits.abs().max() >= LARGE
    # most tokens have logits of thousands, and the penalty is their square
    assert output.loss_sums["z_loss"] > ids.numel() * (LARGE / 10) ** 2
    enlarge_router_logits(model, ids, trained_size)
    gradients = gradients_of_all_parameters(model, ids)
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []


def test_a_nan_in_any_parameter_shows_in_the_loss(model, ids):
    hidden_by = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = parameter.clone()
            parameter.fill_(float("nan"))
            if model(ids, labels=ids).loss.isfinite():
                hidden_by.append(name)
            parameter.copy_(before)
    assert hidden_by == []
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [0, 20, 49])
@torch.no_grad()
def test_one_number_that_is_not_finite_shows_in_the_loss(model, ids, value, token):
    embedded = model.model.embed_tokens(ids).clone()
    embedded[1, token, 3] = value
    assert not model(inputs_embeds=embedded, labels=ids).loss.isfinite()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float16, 65504.0), (torch.bfloat16, 1e30)])
def test_cross_entropy_and_focal_are_finite_at_extreme_logits(dtype, size, gamma):
    right, wrong = torch.zeros(9), torch.zeros(9)
    right[4], wrong[4] = size, -size
    wrong[5] = size
    # certain and right, certain and wrong, and undecided
    logits = torch.stack((right, wrong, torch.full((9,), size), torch.zeros(9))).to(dtype)[None].requires_grad_()
    sums = language_loss_sums(logits, torch.tensor([[-100, 4, 4, 4]]), torch.nn.Identity(), gamma)
    assert sums["cross_entropy"].isfinite() and sums["focal"].isfinite()
    assert sums["cross_entropy"] >= size
    (sums["cross_entropy"] + sums["focal"]).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_a_loss_that_is_not(value):
    logits = torch.zeros(1, 3, 9)
    logits[0, 1, 5] = value
    sums = language_loss_sums(logits, torch.tensor([[-100, 4, 4]]), torch.nn.Identity(), 2.0)
    assert not sums["cross_entropy"].isfinite() and not sums["focal"].isfinite()

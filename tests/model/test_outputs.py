"""The model's outputs have the names and options that they have in any transformers model."""

import pytest
import torch

GENERATED = {
    "max_new_tokens": 3,
    "do_sample": False,
    "eos_token_id": [],
    "pad_token_id": 1,
    "return_dict_in_generate": True,
}


def test_outputs_that_are_not_requested_are_none(model, ids):
    """Some tools, such as TRL, pass these options in every call, even to the backbone."""
    asked = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
    assert torch.equal(model.model(ids, **asked).last_hidden_state, model.model(ids).last_hidden_state)
    output = model(ids, **asked)
    assert torch.equal(output.logits, model(ids).logits)
    assert output.hidden_states is None and output.attentions is None


@torch.no_grad()
def test_hidden_states_are_those_of_the_embedding_of_each_layer_and_of_the_final_norm(model, ids):
    seen = []
    model.model.liquid_embedding.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    for given, expected in zip(output.hidden_states[:-1], seen[:-1], strict=True):
        assert torch.equal(given, expected)
    assert torch.equal(output.hidden_states[-1], model.model(ids).last_hidden_state)


def test_hidden_states_are_returned_once_if_layers_are_recomputed(model, ids):
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    output = model(ids, labels=ids, output_hidden_states=True)
    output.loss.backward()
    assert len(output.hidden_states) == 3


@torch.no_grad()
def test_only_eager_attention_returns_weights_and_they_lie_in_the_window(model, ids):
    with pytest.raises(ValueError, match=r'set_attn_implementation\("eager"\)'):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(3, 4, 50, 50)] * 2
    place = torch.arange(50)
    inside = (place <= place[:, None]) & (place > place[:, None] - model.config.sliding_window)
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 50))
        assert (weights[..., ~inside] == 0).all() and (weights[..., inside] > 0).all()


def test_generation_returns_hidden_states_and_attentions_of_each_step(model, ids):
    model.set_attn_implementation("eager")
    output = model.generate(ids, **GENERATED, output_hidden_states=True, output_attentions=True)
    assert [[state.shape for state in step] for step in output.hidden_states] == [[(3, n, 32)] * 3 for n in (50, 1, 1)]
    assert [len(step) for step in output.attentions] == [2] * 3


def test_without_return_dict_the_output_is_a_tuple(model, ids):
    expected = model(ids, labels=ids)
    given = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert type(given) is tuple
    assert torch.equal(given[0], expected.loss) and torch.equal(given[1], expected.logits)
    backbone = model.model(ids, return_dict=False)
    assert type(backbone) is tuple and torch.equal(backbone[0], model.model(ids).last_hidden_state)

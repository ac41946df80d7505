"""Decoding with a cache gives the same logits as reading the whole text at once, and its state does not grow."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from model import LiquidForCausalLM

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": [], "pad_token_id": 1}


@pytest.fixture(params=["dynamic", "static"])
def cache(request, config):
    return DynamicCache(config=config) if request.param == "dynamic" else StaticCache(config, max_cache_len=128)


def decoded(model, ids, cache, lengths, **inputs):
    """Return the logits of `ids`, read in parts of these lengths."""
    logits = []
    for part in ids.split(lengths, dim=1):
        seen = cache.get_seq_length()
        given = {name: value[:, : seen + part.shape[1]] for name, value in inputs.items()}
        logits.append(model(part, past_key_values=cache, **given).logits)
    return torch.cat(logits, dim=1)[..., :101]


# The window is 8, the memory's stride 4, and the convolutions keep 5 and 3 past tokens: parts end on and off each boundary.
@pytest.mark.parametrize(
    "lengths", [[1] * 50, [20] + [1] * 30, [1, 2, 3, 4, 5, 6, 7, 8, 9, 5], [3, 30, 1, 16], [8, 8, 8, 8, 18], [50]]
)
@torch.no_grad()
def test_reading_in_parts_gives_the_logits_of_the_whole_text(model, ids, cache, lengths):
    expected = model(ids, use_cache=False).logits[..., :101]
    torch.testing.assert_close(decoded(model, ids, cache, lengths), expected, **CLOSE)


@torch.no_grad()
def test_a_single_text_gives_the_same_logits_token_by_token(model, ids):
    """A single token is not sorted by expert, which is another code path."""
    expected = model(ids[:1], use_cache=False).logits[..., :101]
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(decoded(model, ids[:1], cache, [7] + [1] * 43), expected, **CLOSE)


@torch.no_grad()
def test_the_memory_runs_at_every_token_if_its_weights_are_gathered(model, ids):
    """Under ZeRO-3 all ranks gather together, wherever their blocks end; otherwise only complete blocks run the LSTM."""
    lstm, calls = model.model.layers[0].memory.lstm, []
    run = type(lstm).forward
    type(lstm).forward = lambda self, *arguments: calls.append(self) or run(self, *arguments)
    try:
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            model(ids[:1, :9], past_key_values=cache)
            for place in range(9, 15):  # the stride is 4: the block of 8 to 11 ends
                model(ids[:1, place : place + 1], past_key_values=cache)
            lstm.register_forward_pre_hook(lambda *_: None)
    finally:
        type(lstm).forward = run
    assert sum(called is lstm for called in calls) == (1 + 1) + (1 + 6)


@pytest.mark.parametrize("lengths", [[12] + [1] * 38, [5, 5, 5, 35], [1] * 50])
@torch.no_grad()
def test_rows_padded_on_the_left_decode_as_they_would_alone(model, ids, cache, lengths):
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :11] = 0, 0
    given = decoded(model, ids, cache, lengths, attention_mask=mask)
    for row, padding in enumerate((7, 0, 11)):
        alone = model(ids[row : row + 1, padding:], use_cache=False).logits[..., :101]
        torch.testing.assert_close(given[row : row + 1, padding:], alone, **CLOSE)


@torch.no_grad()
def test_a_cache_continues_the_last_document_of_a_packed_row(model, ids):
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([9, 41], [30, 20], [5, 13, 32])])
    expected = model(ids, position_ids=positions, use_cache=False).logits[..., :101]
    cache, logits = DynamicCache(config=model.config), []
    for part, place in zip(ids.split([16, 1, 15, 18], dim=1), positions.split([16, 1, 15, 18], dim=1), strict=True):
        logits.append(model(part, position_ids=place, past_key_values=cache).logits[..., :101])
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("stride", [1, 3])
@torch.no_grad()
def test_other_memory_strides_decode_to_the_same_logits(config, ids, stride):
    torch.manual_seed(0)
    other = config.sized_for(config.used_vocab_size, memory_stride=stride)
    model = LiquidForCausalLM(other).eval()
    expected = model(ids, use_cache=False).logits[..., :101]
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(decoded(model, ids, cache, [7, 1, 1, 1, 10, 30]), expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_gives_the_same_tokens_with_and_without_a_cache(model, ids, options):
    mask = torch.ones_like(ids[:, :12])
    mask[0, :5] = 0
    inputs = {"input_ids": ids[:, :12], "attention_mask": mask, **GREEDY}
    plain = {name: value for name, value in options.items() if name != "cache_implementation"}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **plain, use_cache=False))


def test_beam_search_reorders_the_state_with_its_beams(model, ids):
    """Beam search reorders the cache often; each sequence's score must be that of its own tokens."""
    torch.manual_seed(0)
    output = model.generate(
        ids[:2, :12], **GREEDY, num_beams=4, num_return_sequences=4, output_scores=True, return_dict_in_generate=True
    )
    scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    with torch.no_grad():
        logits = model(output.sequences, use_cache=False).logits.float().log_softmax(-1)
    expected = logits[:, 11:-1].gather(2, output.sequences[:, 12:, None]).squeeze(2)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


def state_bytes(cache) -> int:
    tensors = []
    for layer in cache.layers:
        tensors += [layer.keys, layer.values]
        tensors += [
            state for state in (*layer.conv_states.values(), *layer.recurrent_states.values()) if state is not None
        ]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@torch.no_grad()
def test_the_state_is_as_large_after_64k_tokens_as_after_1k(model):
    """The test measures the tensors' storage, so a view of a longer tensor would be noticed."""
    cache, sizes = DynamicCache(config=model.config), []
    ids = torch.randint(4, 101, (1, 4096), generator=torch.Generator().manual_seed(0))
    for part in (ids[:, :1023], *[ids] * 16):
        model(part, past_key_values=cache, logits_to_keep=1)
        model(ids[:, :1], past_key_values=cache)
        sizes.append(state_bytes(cache))
    assert cache.get_seq_length() > 64 * 1024
    assert sizes[-1] == sizes[0]
    assert sizes[0] < 40_000


def test_assisted_decoding_is_refused(model, ids):
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=4)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_a_cache_made_without_the_models_config_is_refused(model, ids):
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=DynamicCache())


def test_a_static_cache_smaller_than_the_window_refuses_tokens_that_do_not_fit(model, ids):
    cache = StaticCache(model.config, max_cache_len=6)  # the window is 8
    model(ids[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 6 tokens but would get 7"):
        model(ids[:, 6:7], past_key_values=cache)


def test_the_loss_of_a_part_is_that_of_its_tokens(model, ids):
    cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    model(ids[:, :20], past_key_values=cache)
    part = model(ids[:, 20:], attention_mask=mask, past_key_values=cache, labels=ids[:, 20:])
    whole = model(ids, labels=torch.where(torch.arange(50) > 20, ids, -100), use_cache=False)
    torch.testing.assert_close(part.loss_sums["cross_entropy"], whole.loss_sums["cross_entropy"], **CLOSE)


def test_a_mask_that_leaves_the_cached_tokens_out_is_refused(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be \(3, 51\)"):
        model(ids[:, :1], attention_mask=torch.ones(3, 1), past_key_values=cache)


def test_generating_after_padding_on_the_right_is_refused(model, ids):
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    with pytest.raises(ValueError, match='padding_side="left"'):
        model.generate(ids, attention_mask=mask, **GREEDY)


def test_training_returns_no_cache_and_recomputed_layers_refuse_one(model, ids):
    model.train()
    assert model(ids, labels=ids).past_key_values is None
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, use_cache=True)

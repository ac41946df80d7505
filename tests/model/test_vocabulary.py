"""The embedding table has more rows than the tokenizer has tokens; the model predicts only the tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import LiquidConfig
from model.modeling import UNUSED_LOGIT


def test_the_vocabulary_is_padded_to_a_multiple_of_128():
    config = LiquidConfig.from_preset("tiny").sized_for(50266)
    assert (config.vocab_size, config.used_vocab_size) == (50304, 50266)


def test_unused_ids_are_never_predicted(model, ids):
    logits = model(ids).logits
    assert logits.shape[-1] == 128
    assert (logits[..., 101:] == UNUSED_LOGIT).all() and logits[..., :101].min() > UNUSED_LOGIT / 100
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kept = logits.to(dtype)
        assert (
            kept.mean(-1).isfinite().all() and torch.distributions.Categorical(logits=kept).entropy().isfinite().all()
        )
    sampled = model.generate(ids, max_new_tokens=20, do_sample=True, temperature=5.0)
    assert sampled.max() < 101


@pytest.mark.parametrize("label", [101, 127, -1])
def test_labels_that_are_no_tokens_are_refused(model, ids, label):
    labels = ids.clone()
    labels[1, 7] = label
    with pytest.raises(ValueError, match=r"0 to 100 .*resize_token_embeddings\(len\(tokenizer\)\)"):
        model(ids, labels=labels)


@pytest.mark.parametrize(
    ("tokens", "multiple", "rows"), [(140, None, 140), (140, 128, 256), (105, 128, 128), (64, None, 64), (64, 128, 128)]
)
def test_a_resized_model_predicts_its_new_tokens_and_can_be_saved(model, tmp_path, tokens, multiple, rows):
    model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple)
    assert (model.config.vocab_size, model.config.used_vocab_size) == (rows, tokens)
    ids = torch.arange(4, tokens).unsqueeze(0)
    output = model(ids, labels=ids)
    assert output.loss.isfinite() and output.logits.shape[-1] == rows
    assert (output.logits[..., :tokens] > UNUSED_LOGIT).all() and (output.logits[..., tokens:] == UNUSED_LOGIT).all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, output.logits)


def test_padding_the_table_changes_no_tokens(model, ids):
    before = model(ids).logits
    model.resize_token_embeddings(pad_to_multiple_of=256)
    assert (model.config.vocab_size, model.config.used_vocab_size) == (256, 101)
    assert torch.equal(model(ids).logits[..., :128], before)
    assert model.resize_token_embeddings() is model.model.embed_tokens


def test_a_size_without_the_special_tokens_is_refused_before_anything_is_cut(model):
    with pytest.raises(ValueError, match=r"eos_token_id .2. must lie between"):
        model.resize_token_embeddings(2)
    assert model.model.embed_tokens.num_embeddings == model.config.vocab_size == 128

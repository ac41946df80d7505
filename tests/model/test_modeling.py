"""The model as a Hugging Face model."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening, pipeline

from data_pipeline.tokens.tokenizer import train_tokenizer
from model import LiquidConfig, LiquidForCausalLM
from model.configuration import preset_names
from model.loss import LossWeights


def test_saving_and_loading_does_not_change_the_logits(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LiquidConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is LiquidForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_generation_is_repeated_argmax(model, ids):
    generated = model.generate(ids[:1, :9], max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=1)
    for length in range(9, 15):
        assert generated[0, length] == model(generated[:, :length]).logits[0, -1].argmax()


def test_transformers_pipeline_generates_text(config, tmp_path):
    tokenizer = train_tokenizer(["What is 7 plus 5?", "It is 12."] * 3, vocab_size=300)
    model = LiquidForCausalLM(config.sized_for(tokenizer.backend.get_vocab_size()))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    prompts = ["What is 7", "It"]
    answers = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        assert answer["generated_text"].startswith(prompt)


def test_micro_batches_of_a_step_add_up_to_its_mean_loss(model, ids):
    """Transformers' trainers pass the number of labels in the whole batch, `num_items_in_batch`, and add the losses."""
    model.train().loss_weights = LossWeights(focal=0.5, reconstruction=0, budget=0, expert_usage=0, z_loss=0)
    labels = ids.clone()
    labels[0, 5:], labels[1, :9] = -100, -100
    whole = model(ids, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = [
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss
        for row in range(len(ids))
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert not torch.isclose(parts[0], parts[1])


def test_in_eval_mode_the_loss_is_the_plain_cross_entropy(model, ids):
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert model.train()(ids, labels=ids).loss > output.loss + 0.01  # the other terms


@pytest.mark.parametrize("training", [False, True])
def test_padding_neither_predicts_nor_is_predicted_on_either_side(model, ids, training):
    """The labels are often a copy of the inputs, padding included."""
    model.train(training)
    alone = model(ids[:1], labels=ids[:1])
    padding = torch.full((1, 7), model.config.pad_token_id)
    for parts in ((padding, ids[:1]), (ids[:1], padding)):
        padded = torch.cat(parts, dim=1)
        mask = torch.cat(
            [torch.ones_like(part) if part is not padding else torch.zeros_like(part) for part in parts], 1
        )
        output = model(padded, attention_mask=mask, labels=padded)
        torch.testing.assert_close(output.loss, alone.loss, atol=1e-5, rtol=1e-5)


def test_a_micro_batch_without_labels_adds_nothing(model, ids):
    """Not even its regularisation, which is weighted by the number of its labels."""
    whole = model.train()(ids, labels=ids).loss
    parts = [model(row, labels=row, num_items_in_batch=ids[:, 1:].numel()).loss for row in ids.split(1)]
    torch.testing.assert_close(sum(parts), whole)
    nothing = torch.full_like(ids, -100)
    for count in (ids[:, 1:].numel(), torch.tensor(0), 0):
        assert model(ids, labels=nothing, num_items_in_batch=count).loss == 0


@pytest.mark.slow
def test_compilation_changes_neither_the_loss_nor_the_gradients(model, ids):
    model.train()
    gradients, losses = [], []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        losses.append(run(ids, labels=ids).loss)
        losses[-1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-3)


def test_every_parameter_gets_a_gradient(model, ids):
    model.train()
    model(ids, labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_recomputation_changes_no_gradient(model, ids):
    model.train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_half_precision_is_finite_and_close_to_fp32(config, model, ids):
    expected = model(ids).logits[..., :101]
    for dtype, tolerance in ((torch.bfloat16, 0.2), (torch.float16, 0.03)):
        half = LiquidForCausalLM(config).eval()
        half.load_state_dict(model.state_dict())
        logits = half.to(dtype)(ids).logits[..., :101].float()
        assert logits.isfinite().all()
        # The median, because rounding may send a few tokens to another expert, which changes their logits more.
        assert (logits - expected).abs().median() < tolerance


def test_presets_have_the_documented_sizes():
    assert set(preset_names()) >= {"tiny", "base"}
    base = LiquidConfig.from_preset("base")
    sizes = (base.hidden_size, base.num_hidden_layers, base.num_attention_heads, base.num_key_value_heads)
    assert sizes == (512, 12, 8, 2)
    assert (base.sliding_window, base.num_experts, base.memory_hidden_size, base.memory_num_layers) == (512, 8, 256, 2)
    assert base.max_position_embeddings == 8192
    with torch.device("meta"):
        parameters = LiquidForCausalLM(base.sized_for(50266)).num_parameters()
    assert 180e6 < parameters < 230e6


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 30}, "hidden_size .30. must be a multiple of num_attention_heads .8."),
        ({"num_key_value_heads": 3}, "num_attention_heads .8. must be a multiple of num_key_value_heads .3."),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok .9. must lie between 1 and num_experts .8."),
        ({"embedding_target_ratio": 0.2}, "embedding_minimum_ratio"),
        ({"memory_stride": 0}, "memory_stride is 0"),
        ({"deformable_range": 1}, "deformable_range is 1; it must be at least 2"),
        ({"used_vocab_size": 60000}, "used_vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"max_position_embeddings": 1}, "max_position_embeddings is 1; it must be at least 2"),
        ({"moe_intermediate_size": 20}, "moe_intermediate_size .20. must be a multiple of 8"),
        (
            {"hidden_size": 36, "num_attention_heads": 6, "deformable_groups": 6},
            "hidden_size .36. must be a multiple of 8",
        ),
        ({"embedding_temperature": 0.0}, "embedding_temperature is 0.0; it must be a finite number above 0"),
        ({"embedding_temperature": math.nan}, "embedding_temperature is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
        ({"pad_token_id": 101, "used_vocab_size": 101}, r"pad_token_id .101. must lie between .* .100.; .* or None"),
        ({"bos_token_id": -1}, "bos_token_id .-1."),
        ({"eos_token_id": [2, 60000]}, "eos_token_id .60000."),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_fix(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        LiquidConfig(**fields)


def test_special_ids_may_be_none_or_several():
    config = LiquidConfig(used_vocab_size=101, pad_token_id=None, bos_token_id=None, eos_token_id=[2, 100])
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, [2, 100])


def test_an_unknown_preset_or_field_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'huge' is neither a preset \(.*tiny.*\)"):
        LiquidConfig.from_preset("huge")
    (tmp_path / "m.yaml").write_text("hiden_size: 8\n")
    with pytest.raises(ValueError, match="hiden_size"):
        LiquidConfig.from_preset(str(tmp_path / "m.yaml"))


@pytest.mark.parametrize("content", ["a: [", "- 1", "hidden_size: abc"])
def test_a_model_file_that_cannot_be_used_is_refused(tmp_path, content):
    (tmp_path / "m.yaml").write_text(content + "\n")
    with pytest.raises((ValueError, TypeError)):
        LiquidConfig.from_preset(str(tmp_path / "m.yaml"))


def test_positions_that_count_the_padding_are_refused(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match="begin at 0 with each text"):
        model(ids, attention_mask=mask, position_ids=torch.arange(50).expand(3, 50))


def test_padding_inside_a_text_is_skipped(model, ids):
    """PEFT's prompt tuning makes such rows: virtual tokens, then the left padding of the batch, then the text."""
    mask = torch.ones_like(ids)
    mask[1, 20:25] = 0
    mask[2, :3] = 0
    whole = model(ids, attention_mask=mask, labels=ids)
    alone = model(torch.cat((ids[1:2, :20], ids[1:2, 25:]), dim=1))
    torch.testing.assert_close(whole.logits[1, :20], alone.logits[0, :20])
    torch.testing.assert_close(whole.logits[1, 25:], alone.logits[0, 20:])
    torch.testing.assert_close(whole.logits[2, 3:], model(ids[2:, 3:]).logits[0])
    torch.testing.assert_close(whole.logits[0], model(ids[:1]).logits[0])
    with pytest.raises(ValueError, match="not available for texts with padding inside"):
        model(ids, attention_mask=mask, output_hidden_states=True)


def test_generation_continues_a_text_with_padding_inside(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 20:25] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 50:]
    alone = torch.cat((ids[1:2, :20], ids[1:2, 25:]), dim=1)
    assert torch.equal(together[1], model.generate(alone, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 45:])


def test_generating_after_padding_is_refused(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    with pytest.raises(ValueError, match='pad prompts with padding_side="left"'):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_packing_is_read_from_the_arguments_of_transformers_collators(model):
    lengths = [7, 1, 12, 30]
    texts = [{"input_ids": list(range(4 + length, 4 + 2 * length))} for length in lengths]
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collator(texts)
    alone = torch.cat([model(torch.tensor([text["input_ids"]])).logits for text in texts], dim=1)
    told = {"position_ids", "seq_idx", "cu_seq_lens_q"}
    assert told < batch.keys()
    for name in told:
        kept = {key: value for key, value in batch.items() if key not in told - {name} and key != "labels"}
        torch.testing.assert_close(model(**kept).logits, alone)
    torch.testing.assert_close(model(**batch).logits, alone)
    loss = torch.nn.functional.cross_entropy(alone[0, :-1], batch["labels"][0, 1:])
    torch.testing.assert_close(
        model(input_ids=batch["input_ids"], labels=batch["labels"], seq_idx=batch["seq_idx"]).loss, loss
    )


def test_invalid_packing_is_refused(model, ids):
    for options, message in (
        ({"seq_idx": torch.zeros(3, 49)}, r"seq_idx has the shape \(3, 49\); it must be \(3, 50\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 20, 50])}, "ranges from 0 to 50; .* end with the batch's 150 tokens"),
        (
            {"seq_idx": (torch.arange(50) // 10).expand(3, 50), "position_ids": torch.arange(50)},
            "position_ids do not restart at 0 where seq_idx",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **options)
    rows = model(
        ids, cu_seq_lens_q=torch.tensor([0, 20, 50, 100, 150])
    ).logits  # the rows of the batch, one after another
    torch.testing.assert_close(rows[0, 20:], model(ids[:1, 20:]).logits[0])
    torch.testing.assert_close(rows[1:], model(ids[1:]).logits)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be combined with cached tokens"):
        model(ids[:, :1], past_key_values=cache, seq_idx=torch.zeros(3, 1))

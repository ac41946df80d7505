"""The DeepSpeed JSON is resolved in one place, and contradictions are refused."""

import json
from pathlib import Path

import pytest
import torch

from launcher.config_file import DEFAULT_CONFIG, load_run_config
from launcher.environment import Environment
from launcher.errors import ConfigurationError
from launcher.training.setup.deepspeed_config import resolve_deepspeed_config

ZERO3 = Path(__file__).parents[3] / "ds_configs" / "zero3.json"


def resolve(overrides=(), world_size=1, path=ZERO3, num_experts=4):
    config = load_run_config(DEFAULT_CONFIG, list(overrides))
    return resolve_deepspeed_config(path, config, Environment(0, world_size, 0, world_size, "test"), num_experts)


@pytest.fixture
def changed(tmp_path):
    def change(location: str, value) -> Path:
        content = json.loads(ZERO3.read_text())
        *parents, last = location.split(".")
        section = content
        for parent in parents:
            section = section[parent]
        section[last] = value
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(content))
        return path

    return change


def test_every_auto_is_replaced_by_the_runs_value():
    resolved, config, _ = resolve(["global_batch_rows=24", "micro_batch_rows=5", "learning_rate=0.5"], world_size=2)
    assert '"auto"' not in json.dumps(resolved)
    batch = [
        resolved[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert batch == [24, 4, 3]  # 5 is an upper limit
    assert resolved["optimizer"]["params"]["lr"] == config.learning_rate == 0.5


def test_the_shipped_json_is_fp16_with_dynamic_scaling_zero3_and_experts():
    content = json.loads(ZERO3.read_text())
    fp16 = content["fp16"]
    assert (fp16["enabled"], fp16["loss_scale"]) == (True, 0)
    assert (fp16["initial_scale_power"], fp16["hysteresis"], fp16["loss_scale_window"]) == (16, 2, 1000)
    assert content["zero_optimization"]["stage"] == 3
    assert content["expert_parallel"]["enabled"] is True


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_does_not_use_fp16_and_prints_one_note(monkeypatch, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved, _, notes = resolve(["expert_parallel_size=1"])
    assert "fp16" not in resolved
    assert resolved.get("bf16", {}).get("enabled", False) is native
    (note,) = (note for note in notes if "CPU" in note)
    assert ("bf16" if native else "fp32") in note
    forced, _, notes = resolve(["precision.force=true", "expert_parallel_size=1"])
    assert forced["fp16"]["enabled"] is True
    assert not any("CPU" in note for note in notes)


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_keeps_bf16_only_if_it_is_native(monkeypatch, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = ZERO3.with_name("zero3_bf16.json")
    resolved, _, notes = resolve(path=path)
    assert resolved.get("bf16", {}).get("enabled", False) is native
    assert any("CPU" in note for note in notes) is not native
    assert resolve(["precision.force=true"], path=path)[0]["bf16"]["enabled"] is True


@pytest.mark.parametrize("name", ["zero1_ep", "zero3", "zero3_bf16"])
def test_the_shipped_jsons_use_the_optimizer_that_needs_no_compiler(name):
    parameters = json.loads((ZERO3.parent / f"{name}.json").read_text())["optimizer"]["params"]
    assert parameters["torch_adam"] is parameters["fused"] is True


def test_on_a_cpu_torchs_adamw_replaces_deepspeeds_with_a_note(changed):
    path = changed("optimizer.params", {"lr": "auto", "weight_decay": "auto"})
    resolved, _, notes = resolve(path=path)
    assert resolved["optimizer"]["params"]["torch_adam"] is resolved["optimizer"]["params"]["fused"] is True
    assert any("the optimizer is torch's fused AdamW" in note for note in notes)
    resolved, _, notes = resolve(path=ZERO3.parent / "zero3_offload.json")
    assert "torch_adam" not in resolved["optimizer"]["params"] and not any("optimizer is" in note for note in notes)


def test_the_values_of_auto_are_listed_in_one_note():
    _, _, notes = resolve(["global_batch_rows=24", "micro_batch_rows=5", "learning_rate=0.5"], world_size=2)
    (note,) = (note for note in notes if note.startswith('"auto"'))
    assert "train_batch_size 24, train_micro_batch_size_per_gpu 4, gradient_accumulation_steps 3" in note
    assert "optimizer.params.lr 0.5" in note and "expert_parallel.autoep_size 2" in note
    assert note.count(", ") + 1 == ZERO3.read_text().count('"auto"')


def test_an_unsupported_auto_is_an_error_of_one_sentence(changed):
    with pytest.raises(ConfigurationError, match='optimizer.params.betas is "auto" in .*, but "auto" is not supported'):
        resolve(path=changed("optimizer.params.betas", "auto"))


@pytest.mark.parametrize(
    ("wanted", "world_size", "experts", "given"), [(8, 4, 8, 4), (8, 6, 8, 2), (4, 4, 6, 2), (2, 1, 4, 1), (2, 2, 4, 2)]
)
def test_expert_parallelism_becomes_the_largest_that_fits(wanted, world_size, experts, given):
    resolved, _, notes = resolve(
        [f"expert_parallel_size={wanted}", "global_batch_rows=12"], world_size, num_experts=experts
    )
    assert resolved["expert_parallel"]["autoep_size"] == given
    assert any(f"using {given}" in note for note in notes) is (given != wanted)


def test_a_number_in_the_json_wins_over_a_default(changed, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("model: tiny\n")
    path = changed("gradient_clipping", 0.3)
    resolved, config, _ = resolve_deepspeed_config(path, load_run_config(run), Environment(0, 1, 0, 1, "test"), 4)
    assert resolved["gradient_clipping"] == config.gradient_clipping == 0.3


def test_a_whole_number_may_be_written_with_a_decimal_point(changed):
    resolved, config, _ = resolve(path=changed("train_batch_size", 8.0))
    assert (resolved["train_batch_size"], config.global_batch_rows) == (8, 8) and type(config.global_batch_rows) is int


def test_different_numbers_in_the_json_and_the_run_are_an_error_that_names_both(changed):
    path = changed("optimizer.params.lr", 0.25)
    with pytest.raises(ConfigurationError, match=r"optimizer.params.lr is 0.25 in .* but learning_rate is 0.5"):
        resolve(["learning_rate=0.5"], path=path)
    assert resolve(["learning_rate=0.25"], path=path)[1].learning_rate == 0.25


def test_a_batch_that_does_not_divide_names_the_nearest(changed):
    with pytest.raises(ConfigurationError, match="global_batch_rows is 10, .* over 4 processes; .* are 8 and 12"):
        resolve(["global_batch_rows=10"], world_size=4)
    with pytest.raises(ConfigurationError, match="gradient_accumulation_steps is 3 in the JSON, but .* make 1"):
        resolve(path=changed("gradient_accumulation_steps", 3))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not valid JSON"),
        (b"\x80\x02}q\x00", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"bf16": {"enabled": true, "enabled": false}}', "is not valid JSON: the key enabled occurs twice"),
        (None, "cannot read"),
    ],
)
def test_a_json_that_cannot_be_used_is_an_error_of_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=sentence):
        resolve(path=path)


def test_keys_missing_from_the_json_have_the_runs_values_and_not_deepspeeds_defaults(tmp_path):
    content = json.loads(ZERO3.read_text())
    del content["gradient_clipping"], content["activation_checkpointing"], content["expert_parallel"]["autoep_size"]
    path = tmp_path / "short.json"
    path.write_text(json.dumps(content))
    overrides = ["gradient_clipping=0.3", "activation_checkpointing=false", "expert_parallel_size=2"]
    resolved, _, _ = resolve(overrides, world_size=2, path=path)
    assert resolved["gradient_clipping"] == 0.3
    assert resolved["activation_checkpointing"]["enabled"] is False
    assert resolved["expert_parallel"]["autoep_size"] == 2


@pytest.mark.parametrize(
    ("location", "value", "sentence"),
    [
        ("optimizer", "AdamW", 'optimizer in .* must be an object with keys, not "AdamW"'),
        ("fp16", True, "fp16 in .* must be an object with keys, not true"),
        ("bf16", None, "bf16 in .* must be an object with keys, not null"),
        ("expert_parallel", 2, "expert_parallel in .* must be an object with keys, not 2"),
        ("fp16.enabled", "auto", 'fp16.enabled is "auto" in .*, but "auto" is not supported'),
        ("fp16.loss_scale_window", "auto", 'fp16.loss_scale_window is "auto" in .*, but "auto" is not'),
        ("bf16", {"enabled": True}, "fp16 and bf16 are both enabled in .*; disable one"),
        ("optimizer", {"params": {"lr": "auto"}}, "has no optimizer.type; write one"),
        ("zero_optimization.stage", 0, "has no zero_optimization.stage of 1, 2 or 3, .*; set one of these stages"),
        ("zero_optimisation", {"stage": 3}, "has zero_optimisation, .*; did you mean zero_optimization?"),
        ("zero_optimization.stage", 5, "has no zero_optimization.stage of 1, 2 or 3"),
        ("managed_gradient_accumulation", False, "accumulation is false in .*: the optimizer would step"),
        ("gradient_allreduce_op", "sum", 'gradient_allreduce_op is "sum" in .*: the loss is scaled for a mean'),
        (
            "pipeline",
            {"stages": 2},
            "has pipeline, which is not supported: pipeline parallelism is not implemented; remove it",
        ),
        ("weight_quantization", {"x": 1}, "has weight_quantization, which is not supported: it is untested"),
        ("compile", {"deepcompile": True}, "has compile, which is not supported: it is untested"),
        ("tensorboard", {"enabled": True}, "has tensorboard, .*: a run writes its own TensorBoard figures"),
        ("checkpoint", {"load_universal": True}, "has checkpoint, .*: a run saves its own checkpoints"),
        (
            "activation_checkpointing.cpu_checkpointing",
            True,
            "checkpointing is true in .*; remove it, or write false",
        ),
        ("activation_checkpointing.partition_activations", True, "partition_activations is true in"),
        ("activation_checkpointing.enable", True, "did you mean activation_checkpointing.enabled?"),
        ("expert_parallel.autoep_sise", 2, "did you mean expert_parallel.autoep_size?"),
        (
            "expert_parallel.score_func",
            "sigmoid",
            'score_func is "sigmoid" in .*: the model requires another value; .*write "softmax"',
        ),
        ("zero_optimization.reduce_bucketsize", 5, "did you mean zero_optimization.reduce_bucket_size?"),
        ("zero_optimization.zero_hpz_partition_size", 2, "partition_size, which is not supported: it does not work"),
        ("zero_optimization.offload_optimizer", {"device": "nvme"}, 'device is "nvme" in .*: only offloading to host'),
        (
            "zero_optimization",
            {"stage": 1, "contiguous_gradients": False},
            "contiguous_gradients is false in .*: gradients",
        ),
        (
            "zero_optimization",
            {"stage": 2, "reduce_scatter": False},
            "reduce_scatter is false in .*: DeepSpeed requires it",
        ),
        ("prescale_gradients", True, "prescale_gradients is true in .*: DeepSpeed supports it under ZeRO-1 only"),
        ("fp16.loss_scale_windw", 5, "did you mean fp16.loss_scale_window?"),
        ("fp16.auto_cast", True, "has fp16.auto_cast, which is not supported"),
        ("train_batch_size", 4.5, "train_batch_size is 4.5 in .*; it must be a whole number, or"),
        ("optimizer.params.weight_decay", "0.1", 'weight_decay is "0.1" in .*; it must be a number, or'),
        ("activation_checkpointing.enabled", 1, "enabled is 1 in .*; it must be true or false, or"),
        ("optimizer.param", {}, "did you mean optimizer.params?"),
        ("optimizer.type", "SGD", 'optimizer.type is "SGD" in .*; only Adam and AdamW are supported'),
        ("optimizer.params.weigth_decay", 0.1, "did you mean optimizer.params.weight_decay?"),
        ("scheduler", {"type": "WarmupLR"}, "has scheduler, .* learning_rate.*; remove it"),
    ],
)
def test_keys_that_deepspeed_would_ignore_overwrite_or_fail_on_are_errors_of_one_sentence(
    changed, location, value, sentence
):
    """A CPU changes nothing about this, although DeepSpeed does not get the section of a half precision there."""
    with pytest.raises(ConfigurationError, match=sentence) as raised:
        resolve(path=changed(location, value))
    assert "\n" not in str(raised.value)


def test_an_unsupported_section_may_stay_if_it_is_disabled(changed):
    resolve(path=changed("tensorboard", {"enabled": False}))


@pytest.mark.parametrize(
    ("section", "said"), [(None, "missing"), ({"enabled": False, "autoep_size": "auto"}, "not enabled")]
)
def test_a_note_says_that_the_json_does_not_distribute_the_experts(tmp_path, section, said):
    content = json.loads(ZERO3.read_text())
    content["expert_parallel"] = section
    if section is None:
        del content["expert_parallel"]
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(content))
    resolved, _, notes = resolve(["expert_parallel_size=2"], world_size=2, path=path)
    assert "expert_parallel" not in resolved
    assert any(f"expert_parallel_size 2 is ignored: the JSON's expert_parallel section is {said}" in n for n in notes)
    assert not any("is ignored" in note for note in resolve(["expert_parallel_size=1"], path=path)[2])

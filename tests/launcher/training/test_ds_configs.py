"""The shipped DeepSpeed JSONs train, and the memory tables in ds_configs/README.md are right."""

import json
import math
import sys

import pytest
import yaml

from launcher.deepspeed_json import value_at
from launcher.training.preflight.memory_estimate import Activations, Sizes, saved_bytes, state_bytes
from launcher.training.preflight.memory_tables import activations_table, preset, states_table
from launcher.training.setup.deepspeed_config import read_json
from launcher.training.setup.json_keys import AUTOEP, KEYS
from model import LiquidConfig, LiquidForCausalLM
from tests.launcher.saved_state import differing_runs
from tests.launcher.trainer import PROJECT, start
from tests.launcher.training.test_fp16 import SCALING

FOLDER = PROJECT / "ds_configs"
STEPS = 6
STAGES = {"zero3": 3, "zero3_bf16": 3, "zero1_ep": 1}


def arguments(trainer, name: str) -> list[str]:
    overrides = ["expert_parallel_size=2", "micro_batch_rows=1", f"max_steps={STEPS}"]
    return trainer.arguments(name, *overrides, deepspeed_config=FOLDER / f"{name}.json")


@pytest.fixture(scope="module")
def trained(trainer):
    trainer.outputs = trainer.run(2, *(arguments(trainer, name) for name in STAGES))
    return trainer


def check(trainer, name: str, stage: int) -> dict[int, float]:
    description = yaml.safe_load((trainer.folder / name / "run.yaml").read_text())["deepspeed"]
    assert description["zero_optimization"]["stage"] == stage
    assert description["expert_parallel"]["autoep_size"] == 2
    losses = trainer.scalars(name)["train/loss"]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses.values())
    assert losses[STEPS] < losses[1] - 0.1
    return losses


@pytest.mark.parametrize(("name", "stage"), STAGES.items())
def test_every_json_trains_two_ranks_that_share_the_experts(trained, name, stage):
    losses = check(trained, name, stage)
    # On a CPU all of them train in bf16, or all in fp32.
    assert losses == pytest.approx(trained.scalars("zero3")["train/loss"], rel=1e-2)
    assert losses[1] == pytest.approx(trained.scalars("zero3")["train/loss"][1], rel=1e-3)


# For every key that a JSON may have, a value that differs from DeepSpeed's default but does not change the results.
ANY_STAGE = {
    "managed_gradient_accumulation": True, "gradient_allreduce_op": "mean", "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"}, "use_data_before_expert_parallelism": True,
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "disable_python_gc": True,
    "steps_per_print": 1, "log_level": "warning", "wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True,
    "timers": {"throughput": {"enabled": False}}, "flops_profiler": {"enabled": True, "profile_step": 2},
    "comms_logger": {"enabled": True, "verbose": False},
    "zero_optimization": {
        "reduce_bucket_size": 3000, "use_multi_rank_bucket_allreduce": False, "allgather_partitions": False,
        "allgather_bucket_size": 3000, "overlap_comm": False, "load_from_fp32_weights": False, "sub_group_size": 2000,
        "offload_param": {"device": "cpu", "pin_memory": False}, "round_robin_gradients": True, "parameter_alignment": True,
        "ignore_unused_parameters": False, "memory_efficient_linear": False, "log_trace_cache_warnings": True,
        "enable_sanity_checks": True, "stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 1000, "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True, "stage3_use_all_reduce_for_fetch_params": True,
        "stage3_allgather_sequential": True,
    },
    "expert_parallel": {"enabled": True, "autoep_size": "auto", "use_grouped_mm": False, **AUTOEP},
    "activation_checkpointing": {
        "enabled": True, "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
        "number_checkpoints": 2, "synchronize_checkpoint_boundary": True, "profile": True,
    },
    "optimizer": {"type": "Adam", "params": {
        "lr": "auto", "weight_decay": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True, "fused": False,
        "foreach": True, "adam_w_mode": True,
    }},
}  # fmt: skip
OF_A_STAGE = {
    1: {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    2: {},
    3: {"zero_optimization": {"contiguous_gradients": False, "reduce_scatter": False}},
}
# Keys that the run sets or that other tests cover: test_fp16.py, test_bf16.py, and the tests of offloading below.
OFFLOAD = read_json(FOLDER / "zero3_offload.json")
ELSEWHERE = {
    "": {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"},
    "fp16": set(SCALING),
    "bf16": {"enabled"},
    "zero_optimization": {"offload_optimizer"},
    "zero_optimization.offload_optimizer": set(value_at(OFFLOAD, "zero_optimization.offload_optimizer")),
}


def supported(stage: int) -> dict:
    """Return a JSON's content with every key that the stage supports."""
    content = {**ANY_STAGE, **{key: value for key, value in OF_A_STAGE[stage].items() if key != "zero_optimization"}}
    more = OF_A_STAGE[stage].get("zero_optimization", {})
    return content | {"zero_optimization": {"stage": stage, **ANY_STAGE["zero_optimization"], **more}}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_supported_keys_do_not_change_the_results(trainer, stage):
    plain = trainer.deepspeed_config(f"plain-{stage}", zero_optimization={"stage": stage})
    full = trainer.deepspeed_config(f"full-{stage}", **supported(stage))
    overrides = ["expert_parallel_size=2", "micro_batch_rows=1", "max_steps=4"]
    trainer.run(2, *(trainer.arguments(path.stem, *overrides, deepspeed_config=path) for path in (plain, full)))
    for tag in ("train/loss", "train/grad_norm"):
        expected, found = (trainer.scalars(path.stem)[tag] for path in (plain, full))
        assert len(found) == 4 and found == pytest.approx(expected, rel=1e-5)


def test_every_supported_key_is_tested():
    def tried(section: str) -> set[str]:
        found = [value_at(supported(stage), section) if section else supported(stage) for stage in OF_A_STAGE]
        return {key for content in found for key in content or {}}

    for section, keys in KEYS.items():
        assert set(keys) - {"fp16", "bf16"} == (tried(section) | ELSEWHERE.get(section, set())) - {"fp16", "bf16"}, (
            section
        )


def test_the_values_of_auto_are_printed_by_one_rank(trained):
    told = [result.stdout.count('"auto" in') for result in trained.outputs]
    assert told == [len(STAGES), 0]
    assert "gradient_accumulation_steps 2" in trained.outputs[0].stdout


@pytest.mark.slow  # compiles DeepSpeed's CPU Adam if that has not been done yet
def test_the_offload_json_trains_with_deepspeeds_cpu_adam(trained):
    trained.run(2, arguments(trained, "zero3_offload"))
    losses = check(trained, "zero3_offload", 3)
    assert losses == pytest.approx(trained.scalars("zero3")["train/loss"], rel=1e-2)


@pytest.mark.slow
def test_resuming_with_the_offloaded_optimizer_is_exact(trained):
    """Its kernel keeps products of the betas from step to step, which a new process does not have."""
    for name, steps in (("offload_halves", STEPS // 2), ("offload_halves", STEPS), ("offload_whole", STEPS)):
        overrides = ["expert_parallel_size=2", "micro_batch_rows=1", f"max_steps={steps}", f"schedule.steps={STEPS}"]
        trained.run(2, trained.arguments(name, *overrides, deepspeed_config=FOLDER / "zero3_offload.json"))
    whole, halves = (trained.scalars(f"offload_{name}")["train/loss"] for name in ("whole", "halves"))
    assert halves == whole
    assert differing_runs(trained.folder / "offload_whole", trained.folder / "offload_halves", STEPS) == []


def test_the_readmes_table_of_model_states_is_the_computed_one():
    assert states_table(FOLDER) in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_the_readmes_table_of_activations_is_the_measured_one():
    assert activations_table() in (FOLDER / "README.md").read_text()


def test_the_estimate_for_a_node_is_at_least_the_model_state():
    """At least 16 bytes a parameter are needed, on the GPUs or in the node's memory."""
    for name in ("1b", "8b-a1b"):
        sizes = Sizes.of(preset(name))
        for file in ("zero3", "zero3_offload", "zero1_ep"):
            gpu, host = state_bytes(sizes, read_json(FOLDER / f"{file}.json"), 8, 8)
            assert 8 * gpu + host > 16 * sizes.total


MEASURE = """
import gc, json, sys
import torch, train
import torch.distributed as dist

def live():
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

build_engine, results = train.build_engine, []
def build(*arguments):
    engine = build_engine(*arguments)
    # The peak of a step: weights, gradients, their copies in fp32, moments and buckets are alive.
    engine.optimizer.optimizer.register_step_pre_hook(lambda *_: measured.append(live()))
    return engine
train.build_engine = build
for run in json.loads(sys.argv[1]):
    before = live()  # some tensors of the run before are left
    measured = []
    assert train.main(run) == 0
    results.append(max(measured) - before)
if dist.get_rank() == 0:
    print("RESULT", json.dumps(results))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_estimate_matches_the_live_tensors_of_two_ranks(trainer):
    """Large buckets would hide a small model's state, so they are small here; bf16 is forced on every machine."""
    runs, files = [], []
    for name in ("zero3_bf16", "zero1_ep"):
        content = json.loads((FOLDER / f"{name}.json").read_text())
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            if key in content["zero_optimization"]:
                content["zero_optimization"][key] = 200_000
        file = trainer.folder / f"{name}_measured.json"
        file.write_text(json.dumps(content))
        overrides = [
            "model=tiny",
            "expert_parallel_size=2",
            "max_steps=3",
            "precision.force=true",
            "micro_batch_rows=2",
        ]
        runs.append(trainer.arguments(f"{name}_measured", *overrides, deepspeed_config=file))
        files.append(content)
    results = start(2, [sys.executable, "-c", MEASURE, json.dumps(runs)])
    assert not any(result.returncode for result in results), max(results, key=lambda r: r.returncode).stdout
    measured = json.loads(results[0].stdout.split("RESULT", 1)[1].splitlines()[0])
    sizes = Sizes.of(LiquidConfig.from_pretrained(trainer.folder / "zero1_ep_measured" / "model"))
    for content, live in zip(files, measured, strict=True):
        estimated, _ = state_bytes(sizes, content, 2, 2)
        print(f"stage {content['zero_optimization']['stage']}: estimated {estimated}, live {live}")
        assert 0.7 < live / estimated < 1.05  # 16-bit gradients, which the estimators count, are freed by then


def test_the_estimate_of_activations_matches_a_larger_model():
    """The estimate is measured on fewer layers, experts and tokens than this model has."""
    config = preset("tiny")
    estimate, tokens = Activations.of(config), 1024
    model = LiquidForCausalLM(config).bfloat16().train()
    for recompute in (False, True):
        model._set_gradient_checkpointing(recompute)
        assert saved_bytes(model, tokens) == pytest.approx(estimate.saved(config, tokens, recompute), rel=0.1)


def test_activations_are_counted_whatever_the_tokenizers_special_ids_are():
    """The estimate is measured on a model with a small vocabulary."""
    config = preset("tiny")
    special = config.sized_for(config.used_vocab_size, pad_token_id=50_000, eos_token_id=[2, 50_001])
    assert Activations.of(special) == Activations.of(config)

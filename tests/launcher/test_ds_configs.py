"""The shipped DeepSpeed JSONs train, and ds_configs/README.md says of their memory what is so."""

import json
import math
import sys

import pytest
import yaml

from launcher.settings.deepspeed_config import read_json
from launcher.settings.memory_estimate import (
    Activations,
    Sizes,
    activations_table,
    preset,
    saved_bytes,
    state_bytes,
    states_table,
)
from model import LiquidConfig, LiquidForCausalLM
from tests.launcher.saved_state import differing_runs
from tests.launcher.trainer import PROJECT, start

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
    # On a CPU all of them are bf16, or all fp32.
    assert losses == pytest.approx(trained.scalars("zero3")["train/loss"], rel=1e-2)
    assert losses[1] == pytest.approx(trained.scalars("zero3")["train/loss"][1], rel=1e-3)


def test_what_auto_became_is_printed_by_one_rank(trained):
    told = [result.stdout.count('"auto" in') for result in trained.outputs]
    assert told == [len(STAGES), 0]
    assert "gradient_accumulation_steps 2" in trained.outputs[0].stdout


@pytest.mark.slow  # compiles DeepSpeed's CPU Adam where that has not been done yet
def test_the_offload_json_trains_with_the_optimizer_that_offloading_brings(trained):
    trained.run(2, arguments(trained, "zero3_offload"))
    losses = check(trained, "zero3_offload", 3)
    assert losses == pytest.approx(trained.scalars("zero3")["train/loss"], rel=1e-2)


@pytest.mark.slow
def test_a_resumed_run_with_the_offloaded_optimizer_is_exact(trained):
    """Its kernel keeps products of the betas from step to step, which a new process does not have."""
    for name, steps in (("offload_halves", STEPS // 2), ("offload_halves", STEPS), ("offload_whole", STEPS)):
        overrides = ["expert_parallel_size=2", "micro_batch_rows=1", f"max_steps={steps}", f"schedule.steps={STEPS}"]
        trained.run(2, trained.arguments(name, *overrides, deepspeed_config=FOLDER / "zero3_offload.json"))
    whole, halves = (trained.scalars(f"offload_{name}")["train/loss"] for name in ("whole", "halves"))
    assert halves == whole
    assert differing_runs(trained.folder / "offload_whole", trained.folder / "offload_halves", STEPS) == []


def test_the_readmes_table_of_model_states_is_what_is_computed():
    assert states_table(FOLDER) in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_the_readmes_table_of_activations_is_what_is_counted():
    assert activations_table() in (FOLDER / "README.md").read_text()


def test_a_node_gives_no_preset_less_than_its_state():
    """16 bytes a parameter, at least, lie somewhere: on the GPUs or in the node's memory."""
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
    # Where a step's most is alive: weights, gradients, their copies in fp32, moments and buckets.
    engine.optimizer.optimizer.register_step_pre_hook(lambda *_: measured.append(live()))
    return engine
train.build_engine = build
for run in json.loads(sys.argv[1]):
    before = live()  # of the run before, something is left
    measured = []
    assert train.main(run) == 0
    results.append(max(measured) - before)
if dist.get_rank() == 0:
    print("RESULT", json.dumps(results))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_estimate_is_that_of_live_tensors_on_two_ranks(trainer):
    """Small buckets, since they would hide a small model's state; bf16 is kept wherever this runs."""
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


def test_the_estimate_of_activations_is_what_a_larger_model_saves():
    """Its own layers and experts and several times the tokens, of which the estimate has seen a few."""
    config = preset("tiny")
    estimate, tokens = Activations.of(config), 1024
    model = LiquidForCausalLM(config).bfloat16().train()
    for recompute in (False, True):
        model._set_gradient_checkpointing(recompute)
        assert saved_bytes(model, tokens) == pytest.approx(estimate.saved(config, tokens, recompute), rel=0.1)


def test_activations_are_counted_whatever_the_tokenizers_special_ids_are():
    """The model that is counted has few words."""
    config = preset("tiny")
    special = config.sized_for(config.used_vocab_size, pad_token_id=50_000, eos_token_id=[2, 50_001])
    assert Activations.of(special) == Activations.of(config)

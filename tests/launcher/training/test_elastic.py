"""Resuming with another number of processes, or another expert_parallel_size, than wrote the checkpoint."""

import json
import shutil

import pytest
import torch

from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.tools.export.export import load_run
from launcher.training.checkpoints.checkpoint import read_train_state
from launcher.training.checkpoints.manifest import find_fault
from launcher.training.checkpoints.universal import convert, keep_universal

STEPS, LEFT_AT = 12, 4
COMMON = [f"schedule.steps={STEPS}", "checkpoint_every=2", "keep_checkpoints=10", "global_batch_rows=4"]
# Processes, expert_parallel_size and last step of each run; each one resumes where the one before ended.
LATER = [(2, 1, 10), (2, 2, STEPS)]


@pytest.fixture(scope="module")
def elastic(trainer):
    """`whole`: two ranks share the experts in all steps. `one`: one process resumes from its step 4 and stops at 8."""
    trainer.run(2, trainer.arguments("whole", f"max_steps={STEPS}", "expert_parallel_size=2", *COMMON))
    shutil.copytree(trainer.folder / "whole", trainer.folder / "one")
    arguments = trainer.arguments("one", "max_steps=8", f"resume=step-{LEFT_AT:08d}", *COMMON)
    trainer.outputs = trainer.run(1, arguments)
    return trainer


def assert_same_curve(trainer, output: str, steps: int) -> None:
    whole, other = trainer.scalars("whole"), trainer.scalars(output)
    for tag, tolerance in {"train/loss": 1e-4, "train/grad_norm": 1e-3, "train/learning_rate": 1e-6}.items():
        expected = [whole[tag][step] for step in range(1, steps + 1)]
        assert [other[tag][step] for step in range(1, steps + 1)] == pytest.approx(expected, rel=tolerance), tag


def optimizer_steps(checkpoint) -> set[float]:
    """Return the step counts that Adam has for the parameters of all ranks."""
    steps = set()
    for file in checkpoint.glob("*optim_states.pt"):
        optimizer = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
        steps |= {float(state["step"]) for state in optimizer["state"].values()}
    return steps


def test_one_process_resumes_a_run_of_two_that_shared_the_experts(elastic):
    assert_same_curve(elastic, "one", 8)
    output = elastic.outputs[0].stdout
    assert "was written by 2 processes with expert_parallel_size 2, this run has 1 with 1" in output
    assert "converted to" in output


def test_a_resumed_run_continues_with_the_same_rows_and_adams_step_count(elastic):
    at_8 = [elastic.folder / name / "checkpoints" / "step-00000008" for name in ("whole", "one")]
    whole, one = map(read_train_state, at_8)
    assert (one.position, one.tokens) == (whole.position, whole.tokens) == (8 * 4, whole.tokens)
    torch.testing.assert_close(torch.tensor(one.balancing_bias), torch.tensor(whole.balancing_bias))
    assert [optimizer_steps(folder) for folder in at_8] == [{8.0}, {8.0}]


def test_a_converted_checkpoint_is_used_again(elastic):
    checkpoint = RunFolder(elastic.folder / "one").checkpoints / f"step-{LEFT_AT:08d}"
    universal, is_new = keep_universal(checkpoint)
    assert (universal.name, is_new) == (f"universal-step-{LEFT_AT:08d}", False)
    assert find_fault(universal) is None
    assert not list(checkpoint.parent.glob("*.partial"))


@pytest.mark.slow
def test_more_processes_resume_a_run_of_one_and_spread_the_experts_again(elastic):
    shutil.copytree(elastic.folder / "one", elastic.folder / "more")
    for world_size, expert_parallel_size, steps in LATER:
        overrides = [f"max_steps={steps}", f"expert_parallel_size={expert_parallel_size}", *COMMON]
        (output, *_) = elastic.run(world_size, elastic.arguments("more", *overrides))
        assert "converted to" in output.stdout
    assert_same_curve(elastic, "more", STEPS)
    whole, more = (load_run(elastic.folder / name).state_dict() for name in ("whole", "more"))
    for name, weight in whole.items():
        torch.testing.assert_close(more[name], weight, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_a_rollback_loads_a_checkpoint_in_the_form_for_its_ranks(elastic):
    """One rank rolls back to the checkpoint of two ranks, then to one of its own; resuming by hand gives the same."""
    rows = [20, 40]  # of step 6, and of step 9, which is two steps further in the data by then
    folder = begin_at_4(elastic, "back")
    common = ["checkpoint_every=4", "keep_checkpoints=10", "schedule.steps=12", "global_batch_rows=4"]
    arguments = elastic.arguments(
        "back", "max_steps=10", "on_spike=rollback", "spike.window=4", "spike.factor=30", *common
    )
    (result,) = elastic.run_with_faults(1, arguments, [{"kind": "spike", "positions": rows}])
    assert result.returncode == 0, result.stdout
    state = read_train_state(folder / "checkpoints" / "step-00000010")
    for tag in (f"universal-step-{LEFT_AT:08d}", "step-00000008"):
        assert f"back to {tag}; skipping the rows" in result.stdout
    assert state.skipped_ranges == [[16, 24], [40, 44]]
    assert optimizer_steps(folder / "checkpoints" / "step-00000010") == {10.0}

    begin_at_4(elastic, "by_hand")
    manifest = elastic.folder / "by_hand" / "checkpoints" / f"step-{LEFT_AT:08d}" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["train_state"]["position"] = 24
    manifest.write_text(json.dumps(content))
    elastic.run(1, elastic.arguments("by_hand", "max_steps=8", *common))
    by_hand, back = (elastic.scalars(name)["train/loss"] for name in ("by_hand", "back"))
    assert [by_hand[step] for step in range(5, 9)] == [back[step] for step in range(5, 9)]


def begin_at_4(trainer, name: str):
    """Copy the run of two ranks as it was at step 4."""
    folder = trainer.folder / name
    (folder / "checkpoints").mkdir(parents=True)
    for part in ("model", "checkpoints/step-00000004"):
        shutil.copytree(trainer.folder / "whole" / part, folder / part)
    shutil.copy(trainer.folder / "whole" / "run.yaml", folder)
    (folder / "latest").write_text("step-00000004\n")
    return folder


@pytest.mark.slow
def test_a_converted_checkpoint_that_is_damaged_or_of_other_steps_is_converted_again(elastic, tmp_path):
    checkpoint = shutil.copytree(elastic.folder / "whole/checkpoints/step-00000004", tmp_path / "step-00000004")
    universal, is_new = keep_universal(checkpoint)
    assert is_new
    victim = next((universal / "zero").glob("*/fp32.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert keep_universal(checkpoint) == (universal, True)
    shutil.rmtree(checkpoint)
    shutil.copytree(elastic.folder / "whole/checkpoints/step-00000006", checkpoint)
    assert keep_universal(checkpoint) == (universal, True)
    assert read_train_state(universal).step == 6


@pytest.mark.slow
def test_a_checkpoint_whose_steps_were_all_skipped_is_not_converted(trainer):
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 31, "hysteresis": 1, "loss_scale_window": 1000}
    fp16 = trainer.deepspeed_config("fp16", fp16=scaling)
    arguments = trainer.arguments("skipped", "precision.force=true", "max_steps=1", deepspeed_config=fp16)
    trainer.run(1, arguments, claim_fp16=True)
    checkpoint = trainer.folder / "skipped" / "checkpoints" / "step-00000001"
    with pytest.raises(ConfigurationError, match="all its steps were skipped.*as many processes"):
        convert(checkpoint, checkpoint.with_name("universal"))

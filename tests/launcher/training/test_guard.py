"""Steps that are not finite and losses that spike, with real faults in one rank of two."""

import copy
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from launcher.config import RunConfig
from launcher.errors import ConfigurationError, TrainingError
from launcher.files import replace_text
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState, complete_checkpoints, read_train_state
from launcher.training.checkpoints.manifest import describe_durably, find_fault, write_manifest
from launcher.training.resilience.guard import Guard, is_spike
from tests.launcher.saved_state import differing

ROWS = 4  # in a step
KEEP_ALL = ["expert_parallel_size=2", "micro_batch_rows=1", "checkpoint_every=1", "keep_checkpoints=20"]
NOT_FINITE = [{"kind": "nan", "rank": 1, "steps": [3]}, {"kind": "infinite", "rank": 0, "steps": [4]}]


def check_that_two_steps_were_skipped(trainer, name: str, results) -> None:
    assert [result.returncode for result in results] == [0, 0], results[0].stdout
    folder, shown = trainer.folder / name, trainer.scalars(name)
    assert differing(folder, 2, 3) == [] and differing(folder, 3, 4) == []
    assert differing(folder, 1, 2) and differing(folder, 4, 5)
    assert [shown["train/skipped_steps"][step] for step in range(1, 7)] == [0, 0, 1, 2, 2, 2]
    assert [shown["train/grad_norm"][step] == float("inf") for step in range(1, 7)] == [0, 0, 1, 1, 0, 0]
    for step in (5, 6):
        assert shown["train/loss"][step] < 20
    state = read_train_state(folder / "checkpoints" / "step-00000006")
    assert (state.skipped_steps, len(state.recent_losses), state.position) == (2, 4, 6 * ROWS)
    printed = results[0].stdout
    assert "step 3 is skipped: its loss is not finite (rows at positions 8 to 11; 1 in a row, 1 in all)" in printed
    assert "step 4 is skipped: its loss is not finite (rows at positions 12 to 15; 2 in a row, 2 in all)" in printed


def test_a_step_that_is_not_finite_on_one_rank_changes_no_weights_and_moments(trainer):
    arguments = trainer.arguments("skipped", "max_steps=6", *KEEP_ALL)
    results = trainer.run_with_faults(2, arguments, NOT_FINITE, save_always=True)
    check_that_two_steps_were_skipped(trainer, "skipped", results)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_skipped_in_every_stage_and_precision(trainer, stage, precision):
    sections = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    zero = json.loads(trainer.fp32.read_text())["zero_optimization"] | {"stage": stage}
    name = f"zero{stage}_{precision}"
    path = trainer.deepspeed_config(name, zero_optimization=zero, **sections)
    arguments = trainer.arguments(name, "max_steps=6", *KEEP_ALL, deepspeed_config=path)
    results = trainer.run_with_faults(2, arguments, NOT_FINITE, save_always=True)
    check_that_two_steps_were_skipped(trainer, name, results)


def test_weights_that_may_be_bad_do_not_replace_a_good_checkpoint(trainer):
    """Steps 5 to 7 are not finite. With one checkpoint kept, step 4's stays until step 8 is known to be good."""
    faults = [{"kind": "nan", "rank": 0, "steps": [5, 6, 7]}]
    overrides = ["checkpoint_every=2", "keep_checkpoints=1", "validate_every=0", "schedule.steps=8"]
    for last, code, kept in ((6, 1, "step-00000004"), (8, 0, "step-00000008")):
        arguments = trainer.arguments(f"streak_{last}", f"max_steps={last}", *overrides)
        (result,) = trainer.run_with_faults(1, arguments, faults)
        assert result.returncode == code, result.stdout
        assert "step 6 is not saved: the last 2 steps were not finite; the last checkpoint is" in result.stdout
        folder = trainer.folder / f"streak_{last}" / "checkpoints"
        assert [path.name for path in folder.glob("step-*")] == [kept]
    assert "so the end of the run is not saved" in (trainer.folder / "streak_6" / "status.json").read_text()


@pytest.mark.slow
def test_too_many_skipped_in_a_row_end_the_run_in_one_sentence(trainer):
    faults = [{"kind": "nan", "rank": 1, "steps": list(range(5, 20))}]
    overrides = ["max_steps=20", "checkpoint_every=4", "max_skipped_in_a_row=3"]
    results = trainer.run_with_faults(2, trainer.arguments("hopeless", *overrides), faults)
    assert [result.returncode for result in results] == [1, 1]
    printed = results[0].stdout
    (sentence,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    parts = (
        "4 steps in a row were not finite or had no token to learn, up to step 8",
        "rows at positions 28 to 31",
        "checkpoints/step-00000004",
    )
    assert all(part in sentence for part in parts), sentence
    assert "Traceback" not in printed
    status = json.loads((trainer.folder / "hopeless" / "status.json").read_text())
    assert status["state"] == "failed" and "not finite" in status["reason"]


@pytest.mark.slow
def test_a_run_on_rows_without_labels_ends(trainer):
    arguments = trainer.arguments("unlabelled", "max_steps=20", "checkpoint_every=2", "max_skipped_in_a_row=3")
    (result,) = trainer.run_with_faults(1, arguments, [{"kind": "unlabelled", "steps": [3]}])
    assert result.returncode == 1, result.stdout
    assert "step 3 is skipped: its batch has no supervised token (loss_on=answer)" in result.stdout
    sentence = result.stdout.splitlines()[-1]
    assert sentence.startswith("error: 4 steps in a row") and "no token to learn, up to step 6" in sentence


@pytest.mark.slow
def test_fp16_that_overflows_at_the_smallest_scale_says_what_to_change(trainer):
    """Overflows above the smallest scale do not count as skipped in a row: there are four before the end."""
    scaling = {"enabled": True, "initial_scale_power": 31, "hysteresis": 1, "min_loss_scale": 2**27}
    path = trainer.deepspeed_config("fp16", fp16=scaling)
    overrides = ["max_steps=20", "precision.force=true", "max_skipped_in_a_row=1"]
    results = trainer.run_with_faults(
        2, trainer.arguments("fp16", *overrides, deepspeed_config=path), [], claim_fp16=True
    )
    assert [result.returncode for result in results] == [1, 1]
    (sentence,) = [line for line in results[0].stdout.splitlines() if line.startswith("error: ")]
    parts = ("step 5", "loss scale is at its minimum (1.34218e+08)", "train in bf16", "min_loss_scale", "none")
    assert all(part in sentence for part in parts), sentence
    assert trainer.scalars("fp16")["train/skipped_steps"][5] == 5


def test_engines_that_would_apply_a_step_that_is_not_finite_are_refused():
    plain = SimpleNamespace(optimizer=object())
    with pytest.raises(ConfigurationError, match="stage 0 in fp32.*set stage 1, 2 or 3"):
        Guard(plain, None, None, None, None)
    optimizer = SimpleNamespace(overflow=False, check_grad_overflow=False)
    with pytest.raises(ConfigurationError, match="check_grad_overflow is false"):
        Guard(SimpleNamespace(optimizer=optimizer, bfloat16_enabled=lambda: True), None, None, None, None)


def test_a_spike_is_measured_by_the_usual_distance_of_losses_from_their_median():
    usual = [3.0, 3.1, 2.9, 3.05, 2.95]
    assert not is_spike(3.4, usual, factor=10)
    assert is_spike(3.6, usual, factor=10)
    assert not is_spike(1.0, usual, factor=10)  # only upwards
    assert not is_spike(3.2, [3.0] * 5, factor=10)  # small changes of a constant loss are no spike
    assert is_spike(3.4, [3.0] * 5, factor=10)


@pytest.fixture(scope="module")
def rolled_back(trainer):
    """A spike at the rows of step 8, rolled back to step 6's checkpoint."""
    common = ["on_spike=rollback", "spike.window=4", "spike.factor=30", "checkpoint_every=3", "expert_parallel_size=2"]
    faults = [{"kind": "spike", "positions": [7 * ROWS]}]
    trainer.results = trainer.run_with_faults(
        2, trainer.arguments("rolled", "max_steps=12", "keep_checkpoints=9", *common), faults
    )
    return trainer


def test_a_rollback_resumes_from_the_checkpoint_and_skips_the_spikes_rows(rolled_back):
    assert [result.returncode for result in rolled_back.results] == [0, 0], rolled_back.results[0].stdout
    printed = rolled_back.results[0].stdout
    assert "step 8: the loss spikes to" in printed
    assert "back to step-00000006; skipping the rows at positions 24 to 31" in printed
    folder, shown = rolled_back.folder / "rolled", rolled_back.scalars("rolled")
    assert set(shown["train/loss"]) == set(range(1, 13))
    state = read_train_state(folder / "checkpoints" / "step-00000012")
    assert state.skipped_ranges == [[24, 32]]
    assert state.position == (12 + 2) * ROWS
    assert max(shown["train/loss"].values()) < 20


@pytest.mark.slow
def test_after_a_rollback_the_curve_is_that_of_a_run_without_those_rows(rolled_back):
    """A new process that resumes from step 6 and skips the rows by hand has the same last losses."""
    shutil.copytree(rolled_back.folder / "rolled", rolled_back.folder / "by_hand")
    folder = rolled_back.folder / "by_hand"
    for step in (9, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(folder / "tensorboard")
    path = folder / "checkpoints" / "step-00000006" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["train_state"]["position"] = 8 * ROWS
    path.write_text(json.dumps(manifest))
    rolled_back.run(2, rolled_back.arguments("by_hand", "max_steps=12", "checkpoint_every=3", "expert_parallel_size=2"))
    by_hand, rolled = (rolled_back.scalars(name)["train/loss"] for name in ("by_hand", "rolled"))
    assert by_hand == {step: rolled[step] for step in range(7, 13)}


VAIN = [{"kind": "spike", "positions": list(range(7 * ROWS, 99 * ROWS, ROWS))}]
VAIN_OVERRIDES = ["max_steps=12", "checkpoint_every=3", "spike.window=4", "spike.factor=30"]


@pytest.mark.slow
def test_a_spike_is_marked_by_default(trainer):
    (marked,) = trainer.run_with_faults(1, trainer.arguments("marked", *VAIN_OVERRIDES), VAIN)
    assert marked.returncode == 0, marked.stdout
    shown = trainer.scalars("marked")["train/spike"]
    assert (shown[7], shown[8]) == (0, 1)
    assert read_train_state(trainer.folder / "marked" / "checkpoints" / "step-00000012").skipped_ranges == []


@pytest.mark.slow
def test_rollbacks_that_do_not_help_end_the_run(trainer):
    (ended,) = trainer.run_with_faults(1, trainer.arguments("vain", "on_spike=rollback", *VAIN_OVERRIDES), VAIN)
    assert ended.returncode == 1
    assert ended.stdout.count("back to step-00000006") == 3
    (sentence,) = [line for line in ended.stdout.splitlines() if line.startswith("error: ")]
    assert "spiked again after 3 rollbacks to" in sentence and "step-00000006" in sentence


@pytest.mark.slow
def test_a_rollback_past_a_damaged_checkpoint_saves_its_step_again(trainer):
    at = {"positions": [7 * ROWS]}
    arguments = trainer.arguments("damaged", "on_spike=rollback", "keep_checkpoints=9", *VAIN_OVERRIDES)
    (result,) = trainer.run_with_faults(1, arguments, [{"kind": "spike", **at}, {"kind": "damage", **at}])
    assert result.returncode == 0, result.stdout
    assert "back to step-00000003; skipping the rows at positions 12 to 31" in result.stdout
    run = RunFolder(trainer.folder / "damaged")
    faults = {path.name: find_fault(path) for path in sorted(run.checkpoints.iterdir())}
    assert "sha256" in faults.pop("left-step-00000006")
    assert faults == {f"step-{step:08d}": None for step in (3, 6, 9, 12)}
    assert read_train_state(run.checkpoints / "step-00000006").skipped_ranges == [[12, 32]]


@pytest.fixture
def guard(tmp_path, monkeypatch):
    """A guard with checkpoints of steps 5 and 10; loading one replaces the loss scaler, as DeepSpeed does."""
    run = RunFolder(tmp_path)
    for step in (5, 10):
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text("whole")
        facts = {"train_state": asdict(TrainState(step, ROWS * step, 0, [], 0.0, [])), "world_size": 1}
        files = describe_durably(folder, ["weights"])
        write_manifest(folder, {**facts, "expert_parallel_size": 1, "files": files})
        replace_text(run.latest, f"{folder.name}\n")
    scaler = DynamicLossScaler(4.0, 1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    saved = copy.deepcopy(scaler)
    optimizer = SimpleNamespace(overflow=False, loss_scaler=scaler)
    engine = SimpleNamespace(optimizer=optimizer, config={}, fp16_enabled=lambda: True, bfloat16_enabled=lambda: False)

    def load(engine, folder):
        optimizer.loss_scaler = copy.deepcopy(saved)
        return read_train_state(folder)

    monkeypatch.setattr("launcher.training.resilience.guard.load_checkpoint", load)
    said = []
    monitor = SimpleNamespace(said=said, say=said.append, goes_back_to=lambda step: None)
    checkpoints = SimpleNamespace(settle=lambda: None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Guard(engine, RunConfig(on_spike="rollback"), run, monitor, checkpoints)
    dist.destroy_process_group()


def test_a_rollback_sets_damaged_newer_checkpoints_aside(guard):
    run = guard.run
    (run.checkpoints / "step-00000010" / "weights").write_text("worse")
    state = guard.roll_back(TrainState(12, 12 * ROWS, 0, [], 0.0, []))
    assert (state.step, state.skipped_ranges) == (5, [[5 * ROWS, 12 * ROWS]])
    assert [path.name for path in complete_checkpoints(run)] == ["step-00000005"]
    assert (run.checkpoints / "left-step-00000010" / "weights").read_text() == "worse"
    assert run.latest.read_text() == "step-00000005\n" and not (run.path / "gone_back").exists()
    assert "the damaged checkpoint step-00000010: the sha256 of weights" in guard.monitor.said[0]
    assert "renamed to left-step-00000010" in guard.monitor.said[1]


def test_fp16_at_its_smallest_scale_also_ends_the_run_after_a_rollback(guard):
    state = guard.roll_back(TrainState(12, 12 * ROWS, 0, [], 0.0, []))
    optimizer = guard.engine.optimizer
    assert not optimizer.loss_scaler.raise_error_at_min_scale
    optimizer.overflow = True
    for scale in (2.0, 1.0, 1.0):
        assert not guard.wants_rollback(state)
        optimizer.loss_scaler.cur_scale = scale
        guard.observe(state, 3.0)
    with pytest.raises(TrainingError, match="loss scale is at its minimum.*step-00000010"):
        guard.wants_rollback(state)


def test_rollbacks_past_a_damaged_checkpoint_are_counted_with_later_ones(guard):
    (guard.run.checkpoints / "step-00000010" / "weights").write_text("worse")
    state = TrainState(12, 12 * ROWS, 0, [], 0.0, [])
    for _ in range(3):
        state.recent_losses = [3.0] * guard.config.spike.window
        guard.observe(state, 300.0)
        assert guard.wants_rollback(state)
        state = guard.roll_back(state)
    state.recent_losses = [3.0] * guard.config.spike.window
    guard.observe(state, 300.0)
    with pytest.raises(TrainingError, match="again after 3 rollbacks to .*step-00000005"):
        guard.wants_rollback(state)

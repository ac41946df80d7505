"""Saves that fail, processes that die while saving, and which checkpoints are kept."""

import hashlib
import json
import math
import subprocess

import pytest

from launcher.errors import ConfigurationError
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState, find_checkpoint, read_train_state
from launcher.training.checkpoints.going_back import go_back, still_to_do
from launcher.training.checkpoints.manifest import read_manifest, write_manifest
from launcher.training.checkpoints.saver import delete_old
from launcher.training.checkpoints.universal import keep_universal, note_train_state

STEPS = 12
COMMON = [f"schedule.steps={STEPS}", "checkpoint_every=2", "expert_parallel_size=2"]
KILLS = [
    (4, 0, "kill before the manifest", "step-00000002"),
    (6, 0, "kill before the rename", "step-00000004"),
    (8, 0, "kill before latest", "step-00000008"),
    (10, 0, "kill before old ones are deleted", "step-00000010"),
]


@pytest.fixture(scope="module")
def full(trainer):
    """`whole`: undisturbed. `full`: its small disk is full at step 4, and one rank cannot save at 6 and at the end."""
    folder = trainer.folder / "full" / "checkpoints"
    folder.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    whole = trainer.arguments("whole", f"max_steps={STEPS}", *COMMON)
    shorter, longer = (trainer.arguments("full", f"max_steps={steps}", *COMMON) for steps in (10, STEPS))
    faults = [(1, 4, 0, "full disk"), (1, 6, 1, "file size limit"), (2, STEPS, 1, "file size limit")]
    try:
        trainer.outputs = trainer.run_with_save_faults([whole, shorter, longer], faults)
        yield trainer
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_the_save_and_not_the_run(full):
    output = full.outputs[0].stdout
    failures = [line for line in output.splitlines() if line.startswith("checkpoint") and "could not be saved" in line]
    assert len(failures) == 2, output
    assert "step-00000004" in failures[0] and "No space left on device" in failures[0]
    assert "step-00000006" in failures[1] and "rank 1" in failures[1] and "File too large" in failures[1]
    assert all("training continues" in line for line in failures)
    whole, disturbed = (full.scalars(name)["train/loss"] for name in ("whole", "full"))
    assert disturbed == whole


def test_a_last_save_that_fails_ends_the_run_with_one_sentence(full):
    run = RunFolder(full.folder / "full")
    ended = [rank for rank in full.outputs if rank.returncode == 2]  # `start` kills the other once one has ended
    assert ended, full.outputs[0].stdout
    assert not any("Traceback" in rank.stdout for rank in full.outputs)
    last = ended[0].stdout.splitlines()[-1]
    assert "error: the last checkpoint step-00000012 could not be saved" in last
    assert "the newest one is step-00000010" in last
    assert json.loads((run.path / "status.json").read_text())["state"] == "failed"


def test_failed_saves_leave_the_older_checkpoints_whole_and_nothing_else(full):
    run = RunFolder(full.folder / "full")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000008", "step-00000010"]
    assert find_checkpoint(run, "auto") == (run.checkpoints / "step-00000010", [])
    assert find_checkpoint(run, "step-00000008")[0] is not None
    assert run.latest.read_text() == "step-00000010\n"


@pytest.mark.slow
def test_a_rank_killed_while_it_writes_a_file_costs_only_the_steps_since_the_last_checkpoint(full):
    arguments = full.arguments("inside", f"max_steps={STEPS}", *COMMON)
    killed = full.run_with_save_faults([arguments], [(0, 8, 1, "kill inside a file")])
    assert killed[1].returncode == -9, killed[1].stdout
    assert (full.folder / "inside" / "checkpoints" / "step-00000008.partial").is_dir()
    (resumed, _) = full.run(2, arguments)
    assert "resuming from" in resumed.stdout and "step-00000006" in resumed.stdout
    assert full.scalars("inside")["train/loss"] == full.scalars("whole")["train/loss"]


@pytest.mark.slow
def test_a_run_killed_at_every_stage_of_publishing_has_the_curve_of_an_undisturbed_one(full):
    run = RunFolder(full.folder / "killed")
    arguments = full.arguments("killed", f"max_steps={STEPS}", *COMMON)
    for step, rank, kind, newest in KILLS:
        killed = full.run_with_save_faults([arguments], [(0, step, rank, kind)])
        assert killed[rank].returncode == -9, killed[rank].stdout
        assert find_checkpoint(run, "auto") == (run.checkpoints / newest, [])
    full.run(2, arguments)
    assert full.scalars("killed")["train/loss"] == full.scalars("whole")["train/loss"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000010", "step-00000012"]
    assert run.latest.read_text() == "step-00000012\n"


def make_checkpoint(run: RunFolder, step: int, metric: float | None = None, of: str = "all of x") -> None:
    """Write the checkpoint of a step that was validated with this cross entropy, or not validated if it is None."""
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = TrainState(step, 4 * step, 100 * step, [], 0.0, [])
    if metric is not None:
        state.note_validation(metric, of)
    write_manifest(folder, {"train_state": vars(state), "files": {}})


def test_the_newest_and_the_best_are_kept(tmp_path):
    run = RunFolder(tmp_path / "run")
    kept = []
    for step, metric in {2: 3.0, 4: 2.0, 6: None, 8: 2.5, 10: math.nan, 12: 1.5}.items():
        make_checkpoint(run, step, metric)
        delete_old(run, keep=2)
        kept.append([int(path.name.removeprefix("step-")) for path in sorted(run.checkpoints.iterdir())])
    assert kept == [[2], [2, 4], [4, 6], [4, 6, 8], [4, 8, 10], [10, 12]]


def test_the_best_checkpoint_by_validation_is_found(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step, metric in {2: 3.0, 4: 2.0, 6: 2.5, 8: None}.items():
        make_checkpoint(run, step, metric)
    assert find_checkpoint(run, "best") == (run.checkpoints / "step-00000004", [])
    other = RunFolder(tmp_path / "other")
    make_checkpoint(other, 2)
    with pytest.raises(ConfigurationError, match="has no best checkpoint.*set validate_every"):
        find_checkpoint(other, "best")


def test_a_validation_between_two_saves_makes_neither_the_best(tmp_path):
    """The lowest cross entropy was at step 7; 5 and 10 are saved, and 10's own is higher than that of 5."""
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 5, 7.6)
    state = read_train_state(run.checkpoints / "step-00000005")
    state.step = 7
    assert state.note_validation(5.87, "all of x")
    state.step = 10
    assert not state.note_validation(9.83, "all of x")
    make_checkpoint(run, 10)
    note_train_state(run.checkpoints / "step-00000010", vars(state))
    assert find_checkpoint(run, "best") == (run.checkpoints / "step-00000005", [])


def test_validations_on_other_rows_or_labels_are_not_compared(tmp_path):
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 2, 0.5, of="all of x")
    for step, metric in {4: 2.0, 6: 3.0}.items():
        make_checkpoint(run, step, metric, of="answer of x")
    assert find_checkpoint(run, "best") == (run.checkpoints / "step-00000004", [])
    state = read_train_state(run.checkpoints / "step-00000002")
    assert state.note_validation(4.0, "answer of x") and state.best_metric == 4.0


def test_the_best_checkpoint_is_not_confused_with_another_of_its_step(tmp_path):
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 4, 3.0)
    make_checkpoint(run, 8, 2.0)
    make_checkpoint(run, 12, 2.1)
    start_with(run, "step-00000004")
    make_checkpoint(run, 8, 2.9)
    start_with(run, "left-step-00000012")
    assert find_checkpoint(run, "best") == (run.checkpoints / "step-00000012", [])
    make_checkpoint(run, 16, 2.2)
    delete_old(run, keep=1)
    assert steps_of(run) == ["12", "16", "left-08"]


def test_a_validation_that_is_not_finite_is_never_the_best():
    state = TrainState(1, 4, 100, [], 0.0, [])
    assert not state.note_validation(math.nan, "x") and state.best_step is None
    state.step = 2
    assert not state.note_validation(math.inf, "x") and state.note_validation(3.0, "x")
    state.step = 3
    assert not state.note_validation(math.nan, "x") and (state.best_step, state.best_metric) == (2, 3.0)


def test_without_validations_the_newest_are_kept(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step in (2, 4, 6):
        make_checkpoint(run, step)
    (run.checkpoints / "universal-step-00000002").mkdir()
    (run.checkpoints / "universal-step-00000006").mkdir()
    (run.checkpoints / "step-00000002" / "manifest.json").write_text("{")
    delete_old(run, keep=1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000006", "universal-step-00000006"]


def test_a_validation_is_recorded_in_a_checkpoint_and_in_its_universal_form(tmp_path):
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 2, 1.0)
    make_checkpoint(run, 4)
    checkpoint, universal = (run.checkpoints / name for name in ("step-00000004", "universal-step-00000004"))
    universal.mkdir()
    source = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    write_manifest(universal, {**read_manifest(checkpoint), "source": source})
    state = read_train_state(universal)
    assert state.note_validation(0.5, "all of x")
    note_train_state(checkpoint, vars(state))
    assert find_checkpoint(run, "best") == (checkpoint, [])
    assert read_train_state(checkpoint) == read_train_state(universal) == state and state.validated_step == 4
    assert keep_universal(checkpoint) == (universal, False)


def test_a_checkpoint_without_best_metric_and_skipped_ranges_is_still_read(tmp_path):
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 2)
    manifest = run.checkpoints / "step-00000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    for name in ("best_metric", "best_step", "skipped_ranges", "validated_step", "validation_metric", "validation_of"):
        del content["train_state"][name]
    manifest.write_text(json.dumps({**content, "format": 2}))
    state = read_train_state(find_checkpoint(run, "auto")[0])
    assert (state.step, state.best_metric, state.best_step, state.skipped_ranges) == (2, None, None, [])
    assert state.validated_step == 2  # otherwise every old run would be validated again at its next start


def test_the_best_of_older_checkpoints_without_their_own_metric_is_found(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step, best_step in {2: 2, 4: 4, 6: 4}.items():
        make_checkpoint(run, step)
        manifest = run.checkpoints / f"step-{step:08d}" / "manifest.json"
        content = json.loads(manifest.read_text())
        content["train_state"] |= {"best_step": best_step, "best_metric": 5.0 - best_step}
        for name in ("validation_metric", "validation_of"):
            del content["train_state"][name]
        manifest.write_text(json.dumps(content))
    assert find_checkpoint(run, "best") == (run.checkpoints / "step-00000004", [])
    make_checkpoint(run, 8, 2.0)  # the first with its own metric, which is worse than step 4's 1.0
    delete_old(run, keep=1)
    assert steps_of(run) == ["04", "08"]
    state = read_train_state(run.checkpoints / "step-00000004")
    assert not state.note_validation(2.0, "all of x") and state.best_step == 4


def steps_of(run: RunFolder) -> list[str]:
    return sorted(path.name.replace("step-000000", "") for path in run.checkpoints.iterdir())


def start_with(run: RunFolder, resume: str) -> str:
    """Apply `resume` as rank 0 does, and return the name of the checkpoint that the run resumes from."""
    chosen, _ = find_checkpoint(run, still_to_do(run, resume)[0])
    return go_back(run, chosen, resume)[0].name


@pytest.mark.parametrize("resume", ["step-00000002", "best"])
def test_a_requeued_job_with_the_same_resume_goes_back_once(tmp_path, resume):
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 2, 1.0)
    make_checkpoint(run, 4, 2.0)
    assert start_with(run, resume) == "step-00000002"
    assert steps_of(run) == ["02", "left-04"] and run.latest.read_text() == "step-00000002\n"
    assert start_with(run, resume) == "step-00000002"  # killed before its first save
    make_checkpoint(run, 3)
    make_checkpoint(run, 4)
    for _ in range(2):
        assert start_with(run, resume) == "step-00000004"
        assert "to go back again, delete " in still_to_do(run, resume)[1][0]
    assert steps_of(run) == ["02", "03", "04", "left-04"]
    (run.path / "gone_back").unlink()
    assert start_with(run, resume) == "step-00000002"
    assert steps_of(run) == ["02", "left-03", "left-04", "left-04-2"]  # an older one of the same name stays
    assert start_with(run, "auto") == "step-00000002"
    assert still_to_do(run, resume) == (resume, [])  # the run was resumed otherwise in between, so it is applied again


def test_a_run_can_resume_from_a_checkpoint_that_was_set_aside(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step in (2, 4, 6):
        make_checkpoint(run, step)
    start_with(run, "step-00000002")
    make_checkpoint(run, 3)
    make_checkpoint(run, 4)
    before = (run.checkpoints / "left-step-00000004" / "manifest.json").stat().st_ino
    assert start_with(run, "left-step-00000004") == "step-00000004"
    assert steps_of(run) == ["02", "03", "04", "left-04-2", "left-06"]
    assert (run.checkpoints / "step-00000004" / "manifest.json").stat().st_ino == before
    assert start_with(run, "left-step-00000004") == "step-00000004"
    assert steps_of(run) == ["02", "03", "04", "left-04-2", "left-06"]


def test_a_damaged_checkpoint_that_is_skipped_is_renamed(tmp_path):
    run = RunFolder(tmp_path / "run")
    for step in (2, 4):
        make_checkpoint(run, step)
    (run.checkpoints / "step-00000004" / "manifest.json").write_text("{")
    assert start_with(run, "auto") == "step-00000002"
    assert steps_of(run) == ["02", "left-04"] and run.latest.read_text() == "step-00000002\n"


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_with_only_set_aside_checkpoints_does_not_start_anew(tmp_path, resume):
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 4)
    (run.checkpoints / "step-00000004").rename(run.checkpoints / "left-step-00000004")
    with pytest.raises(ConfigurationError, match="set aside.*set resume=left-step-00000004 to resume from one"):
        find_checkpoint(run, resume)


def test_a_universal_folder_cannot_be_resumed_from(tmp_path):
    run = RunFolder(tmp_path / "run")
    make_checkpoint(run, 4)
    (run.checkpoints / "step-00000004").rename(run.checkpoints / "universal-step-00000004")
    with pytest.raises(ConfigurationError, match="is not a checkpoint of"):
        find_checkpoint(run, "universal-step-00000004")

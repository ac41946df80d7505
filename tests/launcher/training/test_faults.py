"""After a TERM in any part of a step, or a loss of data, a run has a complete checkpoint and resumes exactly."""

import json
import os
import sys

import numpy as np
import pytest

from data_pipeline.loading.reader import ShardFolder
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from launcher.config import RunConfig
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import find_checkpoint, read_train_state
from tests.launcher.saved_state import differing_runs
from tests.launcher.trainer import Trainer, start

STEPS, ROWS = 16, 4  # rows in a step
LOST_AT, LOST_BY = 4, 12  # a shard is lost at the beginning of step 4, and needed at step 12 at the latest
COMMON = [f"max_steps={STEPS}", "checkpoint_every=2", "expert_parallel_size=2", "keep_checkpoints=9"]


pytestmark = pytest.mark.slow  # test_stopping.py has a fast test of a signal, test_guard.py one of a bad batch


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Trainer:
    """A trainer whose data are many small shards."""
    folder = tmp_path_factory.mktemp("faulty")
    prepare("sample", folder / "data", Settings(seq_len=64, rows_per_shard=4), progress=False)
    return Trainer(folder, folder / "data")


def steps_of_shards(data: ShardFolder) -> dict[str, list[int]]:
    """Return the steps that read each shard, by the path of its tar."""
    rows = data.order(RunConfig().seed).rows(np.arange(STEPS * ROWS))
    used = {}
    for position, row in enumerate(rows):
        name = data.index["files"][int(np.searchsorted(data._first_rows, row, side="right")) - 1]["name"]
        used.setdefault(str(data.path / name), []).append(position // ROWS + 1)
    return used


def needed_later(trainer: Trainer, opened_before: bool) -> tuple[str, int]:
    """Return a shard to lose at LOST_AT, and the step that needs it next, which is too late to be read ahead."""
    for path, steps in steps_of_shards(ShardFolder(trainer.data)).items():
        needed = min((step for step in steps if step >= LOST_AT), default=LOST_BY + 1)
        if LOST_AT + 3 <= needed <= LOST_BY and steps[0] == (LOST_AT - 1 if opened_before else needed):
            return path, needed
    raise AssertionError("no such shard; choose another LOST_AT")


def series(trainer: Trainer, *runs: dict) -> list[dict]:
    """Train the runs (tests/launcher/fault_series.py), and return each one's exit codes and output."""
    report = trainer.folder / f"series-{len(list(trainer.folder.glob('series-*.json')))}.json"
    (worker,) = start(1, [sys.executable, "-m", "fault_series", json.dumps([runs, str(report)])], timeout=300)
    assert worker.returncode == 0, worker.stdout
    return json.loads(report.read_text())


def stopped(trainer: Trainer, name: str, part: str, step: int) -> dict:
    return {"arguments": trainer.arguments(name, *COMMON), "fault": part, "step": step}


def lost(trainer: Trainer, name: str, how: str, *overrides: str) -> dict:
    shard, _ = needed_later(trainer, opened_before=how == "cut")
    arguments = trainer.arguments(name, *COMMON, *overrides)
    return {"arguments": arguments, "fault": how, "step": LOST_AT, "shard": shard}


def check_same(trainer: Trainer, name: str) -> None:
    """Check that the curve, the weights and the moments are those of the undisturbed run."""
    whole, other = (trainer.scalars(output)["train/loss"] for output in ("whole", name))
    assert other == whole and set(whole) == set(range(1, STEPS + 1))
    assert differing_runs(trainer.folder / "whole", trainer.folder / name, STEPS) == []


def check_lost(trainer: Trainer, name: str, result: dict, how: str) -> None:
    shard, needed = needed_later(trainer, opened_before=how == "cut")
    assert result["codes"] == [2, 2], result["printed"]
    for printed in result["printed"]:
        sentence = printed.splitlines()[-1]
        assert sentence.startswith("error: rank") and os.path.basename(shard) in sentence, printed
        assert "resumes there when it is started again" in sentence and "Traceback" not in printed
    checkpoint, passed_over = find_checkpoint(RunFolder(trainer.folder / name), f"step-{needed - 1:08d}")
    assert passed_over == [] and read_train_state(checkpoint).position == (needed - 1) * ROWS


def attempts(trainer: Trainer, name: str) -> list[dict]:
    """Return how each start ended."""
    lines = [json.loads(line) for line in (trainer.folder / name / "attempts.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "ended"]


@pytest.fixture(scope="module")
def representative(faulty):
    """`whole`: undisturbed. `twice`: a TERM in a backward pass, then a shard is deleted, then it is there again."""
    whole, end = ({"arguments": faulty.arguments(name, *COMMON)} for name in ("whole", "twice"))
    faulty.results = series(
        faulty, whole, stopped(faulty, "twice", "backward", 1), lost(faulty, "twice", "delete"), end
    )
    return faulty


def test_a_term_in_a_backward_pass_and_a_deleted_shard_cost_nothing(representative):
    _, term, deleted, end = representative.results
    assert term["codes"] == [75, 75], term["printed"]
    check_lost(representative, "twice", deleted, "delete")
    assert end["codes"] == [0, 0], end["printed"]
    check_same(representative, "twice")


def test_every_attempt_has_a_line_that_says_how_it_ended(representative):
    lines = attempts(representative, "twice")
    _, needed = needed_later(representative, opened_before=False)
    assert [(line["state"], line["step"]) for line in lines] == [
        ("stopped", 2),
        ("failed", needed - 1),
        ("done", STEPS),
    ]
    assert "shard-" in lines[1]["reason"] and lines[1]["suspects"] == []


def test_a_term_in_a_forward_pass_an_optimizer_step_or_a_save_and_a_cut_shard_cost_nothing(representative):
    name = "often"
    forward, cut, optimizer, save, end = series(
        representative,
        stopped(representative, name, "forward", 1),
        lost(representative, name, "cut"),
        stopped(representative, name, "optimizer", 11),
        stopped(representative, name, "save", 14),
        {"arguments": representative.arguments(name, *COMMON)},
    )
    assert [forward["codes"], optimizer["codes"], save["codes"]] == [[75, 75]] * 3
    check_lost(representative, name, cut, "cut")
    assert end["codes"] == [0, 0]
    steps = [line["step"] for line in attempts(representative, name)]
    assert (steps[0], *steps[2:]) == (2, 12, 15, STEPS)
    check_same(representative, name)


@pytest.mark.parametrize("how", ["delete", "cut"])
def test_a_lost_shard_that_may_be_skipped_leaves_its_rows_without_labels(faulty, how):
    name = f"skipped_{how}"
    (result,) = series(faulty, lost(faulty, name, how, "on_bad_shard=skip"))
    shard, needed = needed_later(faulty, opened_before=how == "cut")
    assert result["codes"] == [0, 0], result["printed"]
    assert any(
        "on_bad_shard is skip" in printed and os.path.basename(shard) in printed for printed in result["printed"]
    )
    bad_rows = faulty.scalars(name)["data/bad_shard_rows"]
    assert bad_rows[needed] >= 1 and not any(bad_rows[step] for step in range(1, needed))

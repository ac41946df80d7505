"""A rank is killed at random moments: no published checkpoint is lost, and the curve is the same.

`LFM_KILLS=20 pytest -s tests/launcher/training/test_kills.py -m slow` kills more often, and prints what happened.
"""

import json
import os
import signal
import sys

import pytest

from launcher.exit_codes import LOST
from launcher.training.checkpoints.checkpoint import read_train_state
from tests.launcher.saved_state import differing_runs
from tests.launcher.trainer import start

STEPS, KILLS, SEED = 40, int(os.environ.get("LFM_KILLS", 4)), 5
COMMON = [f"max_steps={STEPS}", "checkpoint_every=2", "expert_parallel_size=2", "micro_batch_rows=1"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 * (KILLS + 2))]


@pytest.fixture(scope="module")
def killed(trainer):
    """`whole`: undisturbed. `killed`: one of its two ranks is killed repeatedly; `happened` records each start."""
    for name, kills in (("whole", 0), ("killed", KILLS)):
        report = trainer.folder / f"{name}.json"
        arguments = json.dumps([trainer.arguments(name, *COMMON), kills, SEED, str(report)])
        (worker,) = start(1, [sys.executable, "-m", "kill_worker", arguments], timeout=60 * (kills + 2))
        assert worker.returncode == 0, worker.stdout
    trainer.happened = json.loads(report.read_text())
    for event in trainer.happened:
        print(event)
    return trainer


def test_every_kill_hit_its_rank_and_the_other_rank_ended_by_itself(killed):
    *kills, last = killed.happened
    assert len(kills) == KILLS
    for event in kills:
        assert event["codes"].pop(event["rank"]) == -signal.SIGKILL
        # The launcher ends a rank that waits for one that died before it joined.
        expected = (
            LOST,
            -signal.SIGTERM if event["kind"] == "start" else LOST,
        )
        assert event["codes"][0] in expected, event
    assert last["codes"] == [0, 0]


def test_no_checkpoint_that_was_published_is_lost(killed):
    newest = ""
    for event in killed.happened:
        assert event["passed_over"] == []
        # None if no checkpoint has been published yet; names sort by their step.
        assert (event["newest"] or "") >= max(newest, *event["announced"], "")
        newest = event["newest"] or ""


def test_the_curve_and_the_last_checkpoint_are_those_of_the_undisturbed_run(killed):
    whole, disturbed = (killed.scalars(name) for name in ("whole", "killed"))
    assert set(whole["train/loss"]) == set(range(1, STEPS + 1))
    for tag in ("train/loss", "train/grad_norm", "train/cross_entropy", "train/expert_usage"):
        assert disturbed[tag] == whole[tag], tag
    assert differing_runs(killed.folder / "whole", killed.folder / "killed", STEPS) == []
    last = [killed.folder / name / "checkpoints" / f"step-{STEPS:08d}" for name in ("whole", "killed")]
    whole, disturbed = map(read_train_state, last)
    assert disturbed == whole  # counters, running means, and the balancing bias

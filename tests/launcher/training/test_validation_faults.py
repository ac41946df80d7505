"""Validations that a signal interrupts or whose rows are lost: no step is lost, and each one runs later."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from launcher.run_folder import RunFolder
from launcher.training.checkpoints.checkpoint import TrainState, complete_checkpoints, find_checkpoint, read_train_state
from launcher.training.resilience.due_validations import DueValidations
from tests.launcher.saved_state import differing_runs
from tests.launcher.trainer import Trainer, start

STEPS = 4
# The validation at step 2 is better than that at step 4, so step 2's checkpoint is kept only if its result is recorded.
COMMON = [f"max_steps={STEPS}", "checkpoint_every=2", "keep_checkpoints=1", "expert_parallel_size=2"]
COMMON += ["learning_rate=2", "warmup_steps=1", "schedule.steps=6", "validation_samples=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainer:
    """`whole`: undisturbed. `often`: disturbed three times, then trained to its end.

    A TERM comes in the validation at step 2, a shard is lost before the last validation, and another TERM comes when that
    validation runs at the next start.
    """
    folder = tmp_path_factory.mktemp("validations")
    prepare("sample", folder / "data", Settings(seq_len=64, rows_per_shard=4, validation_share=0.02), progress=False)
    trainer = Trainer(folder, folder / "data")
    shard = str(folder / "data" / "validation" / "shard-00000-000.tar")
    whole, often = (trainer.arguments(name, *COMMON) for name in ("whole", "often"))
    series = [
        {"arguments": whole},
        {"arguments": often, "fault": "validation", "step": 2},
        {"arguments": often, "fault": "cut", "step": STEPS, "shard": shard},
        {"arguments": often, "fault": "validation", "step": 0},  # before the first step of this start
        {"arguments": often},
    ]
    report = folder / "series.json"
    (worker,) = start(1, [sys.executable, "-m", "fault_series", json.dumps([series, str(report)])], timeout=300)
    assert worker.returncode == 0, worker.stdout
    trainer.results = json.loads(report.read_text())
    return trainer


def held_out_figures(trainer: Trainer, name: str) -> dict[str, dict[int, float]]:
    return {tag: values for tag, values in trainer.scalars(name).items() if tag.startswith("validation/")}


@pytest.mark.slow
def test_disturbed_validations_give_the_curves_and_the_best_checkpoint_of_an_undisturbed_run(runs):
    assert [result["codes"] for result in runs.results] == [[0, 0], [75, 75], [2, 2], [75, 75], [0, 0]]
    whole = held_out_figures(runs, "whole")
    assert list(whole["validation/cross_entropy"]) == [2, 4] and held_out_figures(runs, "often") == whole
    assert runs.scalars("often")["train/loss"] == runs.scalars("whole")["train/loss"]
    assert differing_runs(runs.folder / "whole", runs.folder / "often", STEPS) == []
    folders = [RunFolder(runs.folder / name) for name in ("whole", "often")]
    kept, others = ([folder.name for folder in complete_checkpoints(run)] for run in folders)
    assert kept == others == ["step-00000004", "step-00000002"]
    best, other = (find_checkpoint(run, "best")[0] for run in folders)
    assert best.name == "step-00000002" and read_train_state(best) == read_train_state(other)
    assert json.loads((runs.folder / "often" / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_lost_held_out_rows_end_the_run_on_all_ranks_after_the_step_is_saved(runs):
    lost = runs.results[2]
    for printed in lost["printed"]:
        sentence = printed.splitlines()[-1]
        assert sentence.startswith("error: rank 0: ") and "shard-00000-000.tar" in sentence, printed
        assert "step 4 is saved" in sentence and "Traceback" not in printed
    attempts = [json.loads(line) for line in (runs.folder / "often" / "attempts.jsonl").read_text().splitlines()]
    ended = [(line["state"], line["step"]) for line in attempts if line["event"] == "ended"]
    assert ended == [("stopped", 2), ("failed", 4), ("stopped", 4), ("done", 4)]
    assert "step 4 was saved without its validation" in runs.results[3]["printed"][0]


@pytest.mark.parametrize("on_bad_shard", ["refuse", "skip"])
def test_a_validation_without_any_row_stops_the_run_only_if_bad_shards_are_refused(on_bad_shard):
    def run(*_, **__):
        raise DataError("every shard of held_out is bad: copy or prepare the folder again")

    said, state, stop = [], TrainState(4, 16, 400, [], 0.0, [], validated_step=2), SimpleNamespace(agreed=False)
    validations = DueValidations(
        SimpleNamespace(module=None), SimpleNamespace(run=run, is_due=lambda step: True), SimpleNamespace(say=said.append),
        None, stop, SimpleNamespace(at_each_forward=lambda *_: nullcontext()), on_bad_shard,
    )  # fmt: skip
    validations.validate_if_due(state)
    assert validations.is_missed(state) and state.best_step is None
    assert stop.agreed == (on_bad_shard == "refuse")
    if on_bad_shard == "skip":
        validations.raise_lost()
        assert said == [
            "skipping the validation of step 4, because on_bad_shard is skip: "
            "every shard of held_out is bad: copy or prepare the folder again"
        ]
    else:
        with pytest.raises(DataError, match="step 4 is saved.*on_bad_shard=skip"):
            validations.raise_lost()

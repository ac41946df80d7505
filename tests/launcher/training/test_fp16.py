"""Real fp16 with dynamic loss scaling: steps that overflow are skipped and the scale is halved until it fits."""

import math
from itertools import pairwise
from statistics import mean

import pytest
import torch

from launcher.tools.export.export import load_run

SETTLED, STEPS = 19, 24
# Every key that a JSON's fp16 section may have.
SCALING = {
    "enabled": True, "loss_scale": 0, "initial_scale_power": 31, "hysteresis": 1, "consecutive_hysteresis": True,
    "loss_scale_window": 1000, "min_loss_scale": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(trainer):
    deepspeed_config = trainer.deepspeed_config("fp16", fp16=SCALING)
    overrides = [
        "precision.force=true",
        "expert_parallel_size=2",
        f"schedule.steps={STEPS}",
        "loss_on=all",
        "monitor.every=2",
    ]
    runs = [
        trainer.arguments("fp16", *overrides, f"max_steps={steps}", deepspeed_config=deepspeed_config)
        for steps in (SETTLED, STEPS)
    ]
    fp32 = trainer.arguments("fp32", *overrides, f"max_steps={STEPS}")
    trainer.outputs = trainer.run(2, *runs, fp32, claim_fp16=True)
    return trainer


def test_overflowing_steps_are_skipped_until_the_scale_fits(run):
    scale = run.scalars("fp16")["train/loss_scale"]
    scales = [scale[step] for step in range(1, STEPS + 1)]
    halvings = [later / earlier for earlier, later in pairwise(scales)]
    assert scales[0] == 2.0**30  # the first step overflowed already
    assert set(halvings) == {0.5, 1.0}
    assert halvings[:8] == [0.5] * 8  # it falls at every step
    assert halvings[SETTLED - 4 : SETTLED - 1] == [1.0] * 3  # and then holds
    norms = run.scalars("fp16")["train/grad_norm"]
    assert all((norms[step + 1] == float("inf")) is (halvings[step - 1] == 0.5) for step in range(1, STEPS))


def test_skipped_steps_do_not_change_the_loss_and_later_ones_lower_it(run):
    shown = run.scalars("fp16")
    scale, entropy = shown["train/loss_scale"], shown["train/cross_entropy"]
    first_update = next(step for step in range(2, STEPS) if scale[step] == scale[step - 1])
    skipped = [entropy[step] for step in range(1, first_update)]
    assert max(skipped) - min(skipped) < 0.6  # other rows, the same weights
    assert mean(entropy[step] for step in range(STEPS - 2, STEPS + 1)) < mean(skipped) - 0.1


def test_skipped_steps_also_balance_the_experts(run):
    """The routers' choices are counts, finite whatever the gradients are."""
    largest = run.scalars("fp16")["balance/bias_max"]
    assert len({largest[step] for step in range(1, 9)}) > 1


def test_the_first_loss_is_that_of_fp32(run):
    fp16, fp32 = (run.scalars(name)["train/loss"][1] for name in ("fp16", "fp32"))
    assert fp16 == pytest.approx(fp32, rel=2e-3)


def test_weights_are_finite_and_move_once_the_scale_fits(run):
    first, last = (load_run(run.folder / "fp16", f"step-{step:08d}").state_dict() for step in (SETTLED, STEPS))
    assert all(weight.isfinite().all() for weight in last.values())
    assert not any(torch.equal(first[name], last[name]) for name in last if name.endswith("proj.weight"))


def test_gradient_norms_of_groups_do_not_contain_the_loss_scale(run):
    shown = run.scalars("fp16")
    tags = [tag for tag in shown if tag.startswith("grad_norm/")]
    finite = [step for step in shown[tags[0]] if math.isfinite(shown["train/grad_norm"][step])]
    assert len(tags) == 7 and len(finite) > 2
    for step in finite:
        total = sum(shown[tag][step] ** 2 for tag in tags) ** 0.5
        assert total == pytest.approx(shown["train/grad_norm"][step], rel=1e-3)
        # Nor do the activations' gradients contain it: with a scale of 2^17 they would be in the thousands.
        assert 0 < shown["gradients/model.norm/max_abs"][step] < 1


def test_gradients_that_overflow_are_not_reported_as_a_fault(run):
    assert not any("the gradients of" in result.stdout for result in run.outputs)

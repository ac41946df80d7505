"""The learning rate is torch's schedule, as a function of the step."""

import pytest
import torch

from launcher.config import RunConfig, Schedule
from launcher.training.setup.schedule import learning_rate


@pytest.mark.parametrize(("cycles", "multiplier", "first"), [(1, 1.0, 90), (3, 1.0, 30), (2, 2.0, 30)])
def test_after_the_warm_up_it_is_torchs_cosine_with_warm_restarts(cycles, multiplier, first):
    config = RunConfig(
        learning_rate=0.1,
        warmup_steps=10,
        max_steps=100,
        schedule=Schedule(cycles=cycles, multiplier=multiplier, minimum_ratio=0.2),
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=first, T_mult=int(multiplier), eta_min=0.02
    )
    for step in range(10, 100):
        assert learning_rate(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_warm_up_is_linear_and_ends_at_the_peak():
    config = RunConfig(learning_rate=0.1, warmup_steps=10, max_steps=100)
    assert [learning_rate(config, step) for step in (0, 4, 9)] == pytest.approx([0.01, 0.05, 0.1])


def test_the_minimum_holds_after_the_schedules_end():
    config = RunConfig(learning_rate=0.1, warmup_steps=10, max_steps=500, schedule=Schedule(steps=100))
    assert [learning_rate(config, step) for step in (100, 499)] == pytest.approx([0.01, 0.01])


def test_raising_max_steps_does_not_change_a_schedule_with_its_own_end():
    short, long = (RunConfig(max_steps=steps, warmup_steps=5, schedule=Schedule(steps=40)) for steps in (20, 40))
    assert [learning_rate(short, step) for step in range(20)] == [learning_rate(long, step) for step in range(20)]

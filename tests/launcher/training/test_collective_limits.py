"""Ranks wait for one another for hours before the first step, and later slightly longer than the watchdog."""

import sys

import pytest

from tests.launcher.trainer import start

# Rank 0 is late with the plan, as if it prepared the data. Later rank 1 is late, as if it hung.
LATE = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import train
from launcher.training.engine import limit_collectives

rank, plan = int(os.environ["RANK"]), train.make_plan

def planned_late(*arguments):
    time.sleep(3)
    return plan(*arguments)

train.make_plan = planned_late
assert train.main(sys.argv[1:]) == 0
groups = list(dist.distributed_c10d._world.pg_map)
print("LIMITS", len(groups), {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups})
other = next(group for group in groups[1:] if dist.get_world_size(group) == 2)
limit_collectives(timedelta(seconds=2))
for name, group in {"the world": None, "another group": other}.items():
    if rank == 1:
        time.sleep(10)
        continue
    begun = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        print("FAILED", name, "imed out" in str(error), time.monotonic() - begun < 8)
"""


@pytest.mark.slow
def test_ranks_wait_for_a_late_plan_and_then_a_little_longer_than_the_watchdog(trainer, monkeypatch):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "0")  # DeepSpeed's own limit, in minutes
    arguments = trainer.arguments("late", "max_steps=1", "step_timeout_seconds=100")
    results = start(2, [sys.executable, "-c", LATE, *arguments], patience=30)
    for result in results:
        groups, limits = result.stdout.split("LIMITS ")[1].splitlines()[0].split(maxsplit=1)
        assert int(groups) > 1 and limits == "{340.0}"
    assert "FAILED the world True True" in results[0].stdout
    assert "FAILED another group True True" in results[0].stdout

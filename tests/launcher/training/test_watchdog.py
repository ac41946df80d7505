"""A step that hangs gives the stacks of all ranks and exit code 76, whatever the main thread is doing."""

import json

import pytest


def hang(trainer, name: str, kind: str):
    overrides = ["max_steps=9", "checkpoint_every=100", "expert_parallel_size=2", "step_timeout_seconds=6"]
    faults = [{"kind": kind, "rank": 1, "steps": [3]}]
    return trainer.run_with_faults(2, trainer.arguments(name, *overrides), faults, grace=3)


def test_a_hung_step_leaves_the_stacks_of_all_ranks_and_ends_with_76(trainer):
    """Rank 1 sleeps in Python; rank 0 waits for it in C, inside a collective."""
    results = hang(trainer, "hung", "hang")
    assert [result.returncode for result in results] == [76, 76]
    stacks = [(trainer.folder / "hung" / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("in train_step" in stack for stack in stacks)
    assert "in before" in stacks[1] and "in before" not in stacks[0]
    for rank, result in enumerate(results):
        assert f"error: rank {rank}: step 3 hangs: it took longer than step_timeout_seconds allows" in result.stdout
        assert "in train_step" in result.stdout
    status = json.loads((trainer.folder / "hung" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 3)
    assert "step 3 hangs" in status["reason"]


@pytest.mark.slow
def test_a_hang_in_c_code_that_holds_the_interpreters_lock_ends_as_well(trainer):
    results = hang(trainer, "locked", "hang_in_c")
    assert results[0].returncode == 76
    assert results[1].returncode == 1  # faulthandler's own exit
    assert "in before" in (trainer.folder / "locked" / "stacks" / "rank-1.txt").read_text()

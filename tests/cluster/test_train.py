"""`sbatch slurm/train.sbatch` on two nodes: whatever ends a run, its curve is that of one that nothing disturbed."""

import pytest
from conftest import STEPS
from jobs import curves, processes_with, read_status

pytestmark = pytest.mark.cluster


def test_two_nodes_give_the_losses_of_one(submit, project, configured, undisturbed):
    """The experts are spread over both, so that every token crosses the network."""
    job = submit("train", *configured, "output=runs/two-nodes")
    job.finish()
    assert "2 ranks on node[1-2], master node1:" in job.log
    assert set(undisturbed["train/loss"]) == set(range(1, STEPS + 1))
    assert curves(project / "runs" / "two-nodes") == undisturbed

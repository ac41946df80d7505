"""Each launcher's variables become the same five facts."""

import pytest

from launcher.environment import detect_environment
from launcher.errors import ConfigurationError

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MASTER}, (3, 4, 1, 2)),  # deepspeed
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}, (3, 4, 1, 2)),  # torchrun
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "4(x2)", **MASTER},
            (5, 8, 1, 4),
        ),
        # inside an allocation, but not started by srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
    ],
)  # fmt: skip
def test_a_launchers_variables_become_a_place(variables, expected):
    environment = detect_environment(variables)
    place = (environment.rank, environment.world_size, environment.local_rank, environment.local_world_size)
    assert place == expected


def test_missing_variables_are_named_with_the_way_to_start():
    with pytest.raises(ConfigurationError, match=r"started by srun, but MASTER_ADDR, MASTER_PORT is not set.*sbatch"):
        detect_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"})
    with pytest.raises(ConfigurationError, match="WORLD_SIZE"):
        detect_environment({"RANK": "0", "LOCAL_RANK": "0", **MASTER})

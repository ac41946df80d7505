"""Set what a training process needs before torch and DeepSpeed start: cores, memory, compiled operators, ports."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

from launcher.environment import Environment, free_port

LONGEST_COMPILATION = 600  # seconds; one operator takes about 30


def export_for_torch(environment: Environment) -> None:
    """Set what torch and DeepSpeed read from the environment: rendezvous, cores and the folder of compiled operators."""
    # DeepSpeed uses LOCAL_RANK as the GPU's index.
    local_rank = environment.local_rank if environment.device.type == "cpu" else environment.device.index
    os.environ.update(RANK=str(environment.rank), WORLD_SIZE=str(environment.world_size), LOCAL_RANK=str(local_rank))
    if environment.world_size == 1:
        # No other process joins, so any free port works, and several runs can share a machine.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if environment.device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            import torch

            # By default every process uses all cores, so that several compete for them.
            torch.set_num_threads(_cores_of_a_process(environment))
        _keep_freed_memory()
    _export_for_compiler()


def _cores_of_a_process(environment: Environment) -> int:
    seen = len(os.sched_getaffinity(0))
    if environment.launcher == "srun" and (of_task := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return min(int(of_task), seen)  # if SLURM binds tasks to cores, a task sees only its own
    return max(1, seen // environment.local_world_size)


def _keep_freed_memory() -> None:
    """Make glibc keep the memory that a step frees for the next step, as CUDA's allocator does.

    By default each large tensor is mapped, zeroed page by page and unmapped again, which can take a CPU as long as the
    arithmetic. If glibc's own variables are set, they are respected.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    mallopt(trim_threshold, -1)  # never trim
    mallopt(mmap_max, 0)


def _export_for_compiler() -> None:
    """Keep the operators that DeepSpeed compiles at run time in the Python environment that they were compiled for."""
    binaries = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if binaries not in path.split(os.pathsep):
        os.environ["PATH"] = binaries + os.pathsep + path  # finds ninja if the environment is not activated
    operators = Path(sys.prefix) / "torch_extensions"
    if operators.is_dir() or os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(operators))
    _remove_stale_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", operators)))


def _remove_stale_locks(operators: Path) -> None:
    """Remove lock files of operators that a killed process left behind, because loading would wait for them forever."""
    for lock in operators.glob("*/lock"):
        with suppress(FileNotFoundError):  # its owner or another rank removed it first
            age = time.time() - lock.stat().st_mtime
            if age > LONGEST_COMPILATION:
                lock.unlink()
            else:
                print(
                    f"{lock} is {age:.0f} s old: another process is compiling that operator, or was interrupted; if none is "
                    "running, delete this file, or the start will wait for it forever",
                    file=sys.stderr,
                )

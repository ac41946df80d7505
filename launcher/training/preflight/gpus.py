"""The health of a machine's GPUs as nvidia-smi tells it: memory errors, throttling, NVLink."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from launcher.training.preflight.findings import GREEN, RED, YELLOW, Finding

FIELDS = (
    "index", "uuid", "name", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending",
    "clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown", "temperature.gpu",
)  # fmt: skip
# From Ampere on rows are remapped, where older GPUs retired pages; a query of its own, by the UUID.
REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
UNKNOWN = ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]")  # in brackets, and no fault
NO_DEVICES, NO_DRIVER = 6, 9  # nvidia-smi's exit codes
PATIENCE = 30  # seconds; nvidia-smi hangs where a driver does
EXCLUDE = "exclude this node, and tell its keepers"


def check_gpus(variables: Mapping[str, str] = os.environ) -> list[Finding]:
    """One line for the health of this job's GPUs and one for NVLink; a single one where it has no GPUs."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("GPUs", GREEN, "none: this machine trains on its CPU")]
    own = own_gpus(variables)
    if own == []:
        return [Finding("GPUs", GREEN, "none of them is this job's: it trains on the CPU")]
    try:
        table = _ask(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
        remapped = _ask(f"--query-remapped-rows={','.join(REMAPPED)}", "--format=csv,noheader,nounits")
        links = _ask("nvlink", "--status")
    except subprocess.TimeoutExpired:
        return [Finding("GPUs", RED, f"nvidia-smi does not answer within {PATIENCE} s", EXCLUDE)]
    said = " ".join((table.stdout + table.stderr).split())[:200]
    if table.returncode in (NO_DEVICES, NO_DRIVER) and own is None and not _were_asked_for(variables):
        return [Finding("GPUs", YELLOW, f"none, so that this machine trains on its CPU; nvidia-smi says: {said}",
                        "ask for GPUs (sbatch --gpus-per-node) where it should not")]  # fmt: skip
    if table.returncode != 0:
        return [Finding("GPUs", RED, f"nvidia-smi fails: {said}", EXCLUDE)]
    return [
        judge_health(table.stdout, remapped.stdout if remapped.returncode == 0 else "", own),
        judge_links(links.stdout if links.returncode == 0 else ""),
    ]


def check_ranks(ranks: int, variables: Mapping[str, str] = os.environ) -> list[Finding]:
    """Whether SLURM gives this node a GPU for each of the run's `ranks` there, and a rank for each GPU; nothing where so."""
    found = variables.get("SLURM_GPUS_ON_NODE", "")
    of_a_task = "SLURM_GPUS_PER_TASK" in variables or "gpu" in variables.get("SLURM_TRES_PER_TASK", "")
    if not found.isdigit() or of_a_task:  # preflight is one task, and would see that one's GPUs
        return []
    gpus = int(found)
    if ranks > gpus:
        return [Finding("ranks", RED, f"{ranks} on this node, which gives the job {gpus} GPUs: NCCL has no two share one",
                        f"give sbatch --gpus-per-node={ranks}, as many as --ntasks-per-node")]  # fmt: skip
    if ranks < gpus:
        return [Finding("ranks", YELLOW, f"{ranks} on this node, which gives the job {gpus} GPUs: the others stand idle",
                        f"give sbatch --ntasks-per-node={gpus}, as many as --gpus-per-node")]  # fmt: skip
    return []


def own_gpus(variables: Mapping[str, str]) -> list[str] | None:
    """The indices or UUIDs that CUDA_VISIBLE_DEVICES leaves this job; None for all that the machine shows."""
    if (visible := variables.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return None if any(name.startswith("MIG") for name in names) else names  # nvidia-smi does not list slices as GPUs


def _were_asked_for(variables: Mapping[str, str]) -> bool:
    return variables.get("SLURM_GPUS_ON_NODE", "0") != "0"


def _ask(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)


def judge_health(table: str, remapped: str = "", own: list[str] | None = None) -> Finding:
    """Read the answers to `FIELDS` and `REMAPPED`: red for memory errors, yellow where the hardware slows a GPU down.

    Of the GPUs in `own` alone, by index or UUID, where it is given: a neighbour's fault is not this job's.
    """
    broken, slowed, names, waiting, missing = [], [], [], _to_be_reset(remapped), set(own or ())
    for row in csv.reader(io.StringIO(table), skipinitialspace=True):
        values = [value.strip() for value in row]
        if not any(values):
            continue
        if len(values) != len(FIELDS):
            broken.append(f"nvidia-smi says: {', '.join(values)}")
            continue
        index, uuid, name, errors, pending, *reasons, temperature = values
        called = {own_name for own_name in own or () if own_name == index or uuid.startswith(own_name)}
        if own is not None and not called:
            continue
        missing -= called
        names.append(name)
        faults = [value for value in values if value == "ERR!" or (value.startswith("[") and value not in UNKNOWN)]
        if faults:
            broken.append(f"GPU {index} says {faults[0]}")
        elif errors.isdigit() and int(errors) > 0:
            broken.append(f"GPU {index} has {errors} uncorrected memory errors")
        elif pending == "Yes" or uuid in waiting:
            broken.append(f"GPU {index} has bad memory that is not repaired before it is reset")
        if any(reason == "Active" for reason in reasons):
            slowed.append(f"GPU {index} is throttled by its hardware at {temperature} °C")
    broken += [f"CUDA_VISIBLE_DEVICES names {name}, which nvidia-smi does not list" for name in sorted(missing)]
    if broken:
        return Finding("GPUs", RED, "; ".join(broken), "exclude this node; a reset of the GPU may mend it")
    if not names:
        return Finding(
            "GPUs", RED, "nvidia-smi lists none", "ask for GPUs (sbatch --gpus-per-node), or exclude this node"
        )
    if slowed:
        return Finding(
            "GPUs", YELLOW, "; ".join(slowed), "exclude this node where it stays so: all ranks wait for the slowest"
        )
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return Finding("GPUs", GREEN, f"{kinds}: no memory errors, not throttled")


def _to_be_reset(remapped: str) -> set[str]:
    """The UUIDs of GPUs with rows that wait for a reset to be remapped, or could not be; drivers say 0 or No, 1 or Yes."""
    rows = [[value.strip() for value in row] for row in csv.reader(io.StringIO(remapped), skipinitialspace=True)]
    return {row[0] for row in rows if len(row) == len(REMAPPED) and {"1", "Yes"} & set(row[1:])}


def judge_links(status: str) -> Finding:
    """Read `nvidia-smi nvlink --status`: yellow where a link is down, or GPUs of one machine differ in their links."""
    links = {}
    for line in status.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            links[gpu[1]] = [0, 0]
            current = links[gpu[1]]
        elif re.match(r"\s+Link \d+:", line) and links:
            current[0 if "inactive" in line.lower() else 1] += 1
    active = {gpu: up for gpu, (_, up) in links.items()}
    if not any(active.values()):
        return Finding("NVLink", GREEN, "none")
    most = max(active.values())
    fewer = [f"GPU {gpu} has {active[gpu]} of {most} links" for gpu in active if active[gpu] < most]
    if fewer:
        return Finding("NVLink", YELLOW, "; ".join(fewer), "exclude this node: all-to-all inside it is slow")
    return Finding("NVLink", GREEN, f"{most} links up on each GPU")

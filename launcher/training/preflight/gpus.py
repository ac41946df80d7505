"""The health of a machine's GPUs as nvidia-smi reports it: memory errors, throttling, NVLink."""

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
# Ampere and newer GPUs remap faulty rows; older ones retire pages. Remapped rows need a separate query, by UUID.
REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
# Answers for values that are not available. Other answers in brackets are faults.
UNKNOWN = ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]")
NO_DEVICES, NO_DRIVER = 6, 9  # nvidia-smi's exit codes
PATIENCE = 30  # seconds; nvidia-smi hangs if the driver does
EXCLUDE = "exclude this node and report it to its administrators"


def check_gpus(variables: Mapping[str, str] = os.environ) -> list[Finding]:
    """Return one finding for the health of this job's GPUs and one for NVLink; only the first if there are no GPUs."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("GPUs", GREEN, "none, so this machine trains on its CPU")]
    own = own_gpus(variables)
    if own == []:
        return [Finding("GPUs", GREEN, "none for this job, so it trains on the CPU")]
    try:
        table = _ask(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
        remapped = _ask(f"--query-remapped-rows={','.join(REMAPPED)}", "--format=csv,noheader,nounits")
        links = _ask("nvlink", "--status")
    except subprocess.TimeoutExpired:
        return [Finding("GPUs", RED, f"nvidia-smi did not answer within {PATIENCE} s", EXCLUDE)]
    said = " ".join((table.stdout + table.stderr).split())[:200]
    if table.returncode in (NO_DEVICES, NO_DRIVER) and own is None and not _were_asked_for(variables):
        return [Finding("GPUs", YELLOW, f"none, so this machine trains on its CPU; nvidia-smi says: {said}",
                        "if it should train on GPUs, request them (sbatch --gpus-per-node)")]  # fmt: skip
    if table.returncode != 0:
        return [Finding("GPUs", RED, f"nvidia-smi failed: {said}", EXCLUDE)]
    return [
        judge_health(table.stdout, remapped.stdout if remapped.returncode == 0 else "", own),
        judge_links(links.stdout if links.returncode == 0 else ""),
    ]


def check_ranks(ranks: int, variables: Mapping[str, str] = os.environ) -> list[Finding]:
    """Return a finding if SLURM gives this node more or fewer GPUs than the run has `ranks` there."""
    found = variables.get("SLURM_GPUS_ON_NODE", "")
    of_a_task = "SLURM_GPUS_PER_TASK" in variables or "gpu" in variables.get("SLURM_TRES_PER_TASK", "")
    if not found.isdigit() or of_a_task:  # preflight is a single task and would only see its own GPUs
        return []
    gpus = int(found)
    if ranks > gpus:
        return [Finding("ranks", RED, f"{ranks} on this node, but the job has {gpus} GPUs here, and ranks cannot share one",
                        f"give sbatch --gpus-per-node={ranks}, as many as --ntasks-per-node")]  # fmt: skip
    if ranks < gpus:
        return [Finding("ranks", YELLOW, f"{ranks} on this node, but the job has {gpus} GPUs here: the others are idle",
                        f"give sbatch --ntasks-per-node={gpus}, as many as --gpus-per-node")]  # fmt: skip
    return []


def own_gpus(variables: Mapping[str, str]) -> list[str] | None:
    """Return the GPU indices or UUIDs in CUDA_VISIBLE_DEVICES; None if this job may use all GPUs."""
    if (visible := variables.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return None if any(name.startswith("MIG") for name in names) else names  # nvidia-smi does not list slices as GPUs


def _were_asked_for(variables: Mapping[str, str]) -> bool:
    return variables.get("SLURM_GPUS_ON_NODE", "0") != "0"


def _ask(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)


def judge_health(table: str, remapped: str = "", own: list[str] | None = None) -> Finding:
    """Judge nvidia-smi's answers to `FIELDS` and `REMAPPED`: red for memory errors, yellow for throttled GPUs.

    own: indices or UUIDs of this job's GPUs. Others are ignored, since they belong to other jobs. None for all GPUs.
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
            broken.append(f"GPU {index} reports {faults[0]}")
        elif errors.isdigit() and int(errors) > 0:
            broken.append(f"GPU {index} has {errors} uncorrected memory errors")
        elif pending == "Yes" or uuid in waiting:
            broken.append(f"GPU {index} has bad memory that is not repaired until it is reset")
        if any(reason == "Active" for reason in reasons):
            slowed.append(f"GPU {index} is throttled at {temperature} °C")
    broken += [f"CUDA_VISIBLE_DEVICES names {name}, which nvidia-smi does not list" for name in sorted(missing)]
    if broken:
        return Finding("GPUs", RED, "; ".join(broken), "exclude this node; resetting the GPU may repair it")
    if not names:
        return Finding(
            "GPUs", RED, "nvidia-smi lists none", "request GPUs (sbatch --gpus-per-node), or exclude this node"
        )
    if slowed:
        return Finding(
            "GPUs", YELLOW, "; ".join(slowed), "exclude this node if it stays throttled: all ranks wait for the slowest"
        )
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return Finding("GPUs", GREEN, f"{kinds}: no memory errors, no throttling")


def _to_be_reset(remapped: str) -> set[str]:
    """Return the UUIDs of GPUs with rows that will only be remapped by a reset, or could not be remapped.

    Drivers answer 0 and 1, or No and Yes.
    """
    rows = [[value.strip() for value in row] for row in csv.reader(io.StringIO(remapped), skipinitialspace=True)]
    return {row[0] for row in rows if len(row) == len(REMAPPED) and {"1", "Yes"} & set(row[1:])}


def judge_links(status: str) -> Finding:
    """Judge `nvidia-smi nvlink --status`: yellow if a GPU has fewer links up than another in its machine."""
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
        return Finding("NVLink", YELLOW, "; ".join(fewer), "exclude this node, because its all-to-all is slow")
    return Finding("NVLink", GREEN, f"{most} links up on each GPU")

"""The health of a machine's GPUs as nvidia-smi tells it: memory errors, throttling, NVLink."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess

from launcher.preflight.findings import GREEN, RED, YELLOW, Finding

FIELDS = (
    "index", "name", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending",
    "clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown", "temperature.gpu",
)  # fmt: skip
PATIENCE = 30  # seconds; nvidia-smi hangs where a driver does


def check_gpus() -> list[Finding]:
    """One line for the GPUs' health and one for NVLink; a single one where there are no GPUs."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("GPUs", GREEN, "none: this machine trains on its CPU")]
    try:
        table = _ask(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
        links = _ask("nvlink", "--status")
    except subprocess.TimeoutExpired:
        return [
            Finding(
                "GPUs",
                RED,
                f"nvidia-smi does not answer within {PATIENCE} s",
                "exclude this node, and tell its keepers",
            )
        ]
    if table.returncode != 0:
        said = " ".join((table.stdout + table.stderr).split())[:200]
        return [Finding("GPUs", RED, f"nvidia-smi fails: {said}", "exclude this node, and tell its keepers")]
    return [judge_health(table.stdout), judge_links(links.stdout if links.returncode == 0 else "")]


def _ask(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)


def judge_health(table: str) -> Finding:
    """Read the answer to `FIELDS`: red for memory errors, yellow where the hardware slows a GPU down."""
    broken, slowed, names = [], [], []
    for row in csv.reader(io.StringIO(table), skipinitialspace=True):
        index, name, errors, pending, *reasons, temperature = (value.strip() for value in row)
        names.append(name)
        if (errors.isdigit() and int(errors) > 0) or pending == "Yes":
            broken.append(f"GPU {index} has {errors} uncorrected memory errors")
        if any(reason == "Active" for reason in reasons):
            slowed.append(f"GPU {index} is throttled by its hardware at {temperature} °C")
    if not names:
        return Finding(
            "GPUs", RED, "nvidia-smi lists none", "ask for GPUs (sbatch --gpus-per-node), or exclude this node"
        )
    if broken:
        return Finding("GPUs", RED, "; ".join(broken), "exclude this node; a reset of the GPU clears the count")
    if slowed:
        return Finding(
            "GPUs", YELLOW, "; ".join(slowed), "exclude this node where it stays so: all ranks wait for the slowest"
        )
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return Finding("GPUs", GREEN, f"{kinds}: no memory errors, not throttled")


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

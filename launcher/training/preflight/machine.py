"""Checks of the machine: precision, memory, disk space and package versions."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from launcher.deepspeed_json import expert_parallel_size, precision
from launcher.environment import Environment
from launcher.training.preflight.findings import GREEN, RED, YELLOW, Finding
from launcher.training.preflight.memory_estimate import Activations, Sizes, state_bytes
from model import LiquidConfig

CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"
# Bytes per parameter: fp32 weights and Adam's two moments, and the 16-bit weights in ZeRO-1's model file.
CHECKPOINT_BYTES = 14
# If a run needs more than this share of the device's memory, too little is left for CUDA, NCCL and fragmentation.
TIGHT = 0.8
# DeepSpeed's defaults, for a JSON without these keys.
ZERO_DEFAULTS = {"reduce_bucket_size": 500_000_000, "stage3_max_live_parameters": 1_000_000_000}


def check_precision(resolved: dict, environment: Environment) -> Finding:
    """Check that the device supports the precision of the resolved JSON."""
    asked = precision(resolved)
    device = environment.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if asked == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
            return Finding(
                "precision", RED, f"{name} does not support bf16", "use ds_configs/zero3.json, which trains in fp16"
            )
        return Finding("precision", GREEN, f"{asked} on {name}")
    if asked == "fp16":
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            return Finding(
                "precision",
                RED,
                "the JSON enables fp16, which DeepSpeed does not support on this device",
                "remove precision.force, or train on a device with native fp16",
            )
    return Finding("precision", GREEN, f"{asked} on a CPU")


def check_attention(attention: str, environment: Environment) -> Finding:
    """Check that the device can train with the run's `attention`."""
    if attention == "flex_attention" and environment.device.type == "cpu":
        return Finding(
            "attention", RED, "attention is flex_attention, which has no backward pass on a CPU", "set attention=auto"
        )
    return Finding("attention", GREEN, attention)


def check_memory(
    sizes: LiquidConfig, resolved: dict, environment: Environment, seq_len: int, activations: bool, here: bool = True
) -> Finding:
    """Compare the memory estimate of ds_configs/README.md with the device.

    Red if weights, gradients and optimizer alone do not fit; yellow if too little memory is left.

    activations: whether to include activations, which takes seconds.
    here: whether the run will be on this machine. If it will not, and this machine has no GPU, the result is yellow.
    """
    zero = {**ZERO_DEFAULTS, **resolved.get("zero_optimization", {})}
    if zero.get("stage") not in (1, 3):
        return Finding(
            "memory", YELLOW, f"there is no estimate for ZeRO stage {zero.get('stage', 0)}", "watch the first steps"
        )
    for key in ZERO_DEFAULTS:
        if not isinstance(zero[key], (int, float)):
            return Finding(
                "memory",
                RED,
                f"zero_optimization.{key} is {zero[key]!r} in the DeepSpeed JSON, which is not a number",
                "write it as a number without quotes",
            )
    counted = Sizes.of(sizes)
    experts_over = expert_parallel_size(resolved)
    state, _ = state_bytes(counted, {"zero_optimization": zero}, environment.world_size, experts_over)
    needed = float(state)
    available, where = _device_memory(environment)
    message = f"{counted.total / 1e6:,.1f} million parameters need {needed / 1e9:.1f} GB per rank"
    here = here or environment.device.type == "cuda"
    if here and needed > available:
        return Finding(
            "memory",
            RED,
            f"{message}, and a rank has {available / 1e9:.1f} GB ({where})",
            "use more GPUs, a larger expert_parallel_size, ds_configs/zero3_offload.json or a smaller model",
        )
    if activations:
        tokens = resolved["train_micro_batch_size_per_gpu"] * seq_len
        recompute = resolved.get("activation_checkpointing", {}).get("enabled", False)
        with torch.random.fork_rng(devices=[]):
            needed += Activations.of(sizes).peak(sizes, tokens, recompute)
        message += f", {needed / 1e9:.1f} GB with the activations of a micro-batch"
    if not here:
        return Finding(
            "memory",
            YELLOW,
            f"{message}; the memory of the run's nodes is not known here",
            "compare it with their GPUs, or run lfm preflight there",
        )
    message += f", of {available / 1e9:.1f} GB ({where})"
    if needed > TIGHT * available:
        return Finding("memory", YELLOW, message, "set a smaller micro_batch_rows, or activation_checkpointing=true")
    return Finding("memory", GREEN, message)


def _device_memory(environment: Environment) -> tuple[int, str]:
    """Return the bytes of memory that one rank can use, and a description of that memory."""
    device = environment.device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
    total = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            total = min(total, int(text))
    # A SLURM job's own limit, which is not in these files. In megabytes; 0 stands for all of the node's memory.
    if (asked := os.environ.get("SLURM_MEM_PER_NODE", "0")).isdigit() and int(asked):
        total = min(total, int(asked) * 2**20)
    return total // environment.local_world_size, "its share of this machine's memory"


def check_disk(sizes: LiquidConfig, output: str, keep: int) -> Finding:
    """Check that the disk has space for the kept checkpoints, the best one and the one being written."""
    one = CHECKPOINT_BYTES * Sizes.of(sizes).total
    needed = (keep + 2) * one
    folder = Path(output).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()  # os.access is wrong for root and on network disks
    except OSError as error:
        found = f"{existing} is not writable: {error.strerror}"
        return Finding("disk", RED, found, "set output to a folder that you may write to")
    there = _bytes_below(folder / "checkpoints")
    room = shutil.disk_usage(existing).free + there
    message = (
        f"{keep + 2} checkpoints of {one / 1e9:.2f} GB need {needed / 1e9:.2f} GB, and {folder} has space for "
        f"{room / 1e9:.2f} GB"
    )
    if one > room:
        return Finding("disk", RED, message, "delete old runs, or set output to a folder on a larger disk")
    if needed > room:
        return Finding("disk", YELLOW, message, "delete old runs, or set a smaller keep_checkpoints or another output")
    return Finding("disk", GREEN, message)


def _bytes_below(folder: Path) -> int:
    """Add up the sizes of all files in a folder, ignoring files that another job deletes meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # ignores folders that vanish
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def check_versions() -> Finding:
    """Compare the installed packages with constraints.txt, the versions that the tests use."""
    if not CONSTRAINTS.is_file():
        return Finding(
            "versions",
            YELLOW,
            f"package versions are not checked, because {CONSTRAINTS} is missing",
            "run from a checkout of the project",
        )
    pinned = re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    others = []
    for package, wanted in pinned:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue  # part of an optional extra that is not installed
        if installed.split("+")[0] != wanted.split("+")[0]:  # torch says +cpu or +cu130
            others.append(f"{package} {installed} (tested: {wanted})")
    if not others:
        return Finding("versions", GREEN, "as in constraints.txt")
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return Finding("versions", YELLOW, f"not the tested versions: {', '.join(others[:5])}{more}", "run make setup")

"""Preflight's checks of one machine: memory, disk and GPUs."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from launcher.environment import Environment
from launcher.training.preflight.findings import GREEN, RED, YELLOW
from launcher.training.preflight.gpus import check_gpus, check_ranks, judge_health
from launcher.training.preflight.gpus import judge_links as judge_nvlink
from launcher.training.preflight.machine import CHECKPOINT_BYTES, _bytes_below, check_disk, check_memory
from model import LiquidConfig


def test_a_model_that_cannot_fit_is_red_and_a_tight_one_yellow(tmp_path):
    large = LiquidConfig.from_preset("8b-a1b")
    resolved = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"autoep_size": 1},
    }
    many = Environment(0, 4096, 0, 4096, "test")  # each has a small share of this machine's memory
    finding = check_memory(large, resolved, many, 128, activations=False)
    assert finding.level == RED and "zero3_offload.json" in finding.fix
    quoted = {**resolved, "zero_optimization": {"stage": 3, "stage3_max_live_parameters": "1e9"}}
    finding = check_memory(large, quoted, many, 128, activations=False)
    assert finding.level == RED and "stage3_max_live_parameters is '1e9'" in finding.message
    finding = check_memory(large, resolved, many, 128, activations=False, here=False)
    assert finding.level == YELLOW and "not known here" in finding.message
    alone = Environment(0, 1, 0, 1, "test")
    tiny = LiquidConfig.from_preset("tiny")
    assert check_memory(tiny, resolved, alone, 128, activations=True).level == GREEN
    finding = check_memory(tiny, {**resolved, "train_micro_batch_size_per_gpu": 10_000}, alone, 2048, activations=True)
    assert finding.level == YELLOW and "micro_batch_rows" in finding.fix


def test_a_checkpoint_that_cannot_fit_is_red(tmp_path):
    assert check_disk(LiquidConfig.from_preset("tiny"), str(tmp_path / "run"), keep=2).level == GREEN
    assert not (tmp_path / "run").exists()  # the check creates nothing
    assert check_disk(LiquidConfig.from_preset("tiny"), str(tmp_path / "run"), keep=10**9).level == YELLOW
    huge = LiquidConfig.from_preset("8b-a1b")
    huge.num_experts = 2**20
    assert check_disk(huge, str(tmp_path / "run"), keep=2).level == RED


def test_checkpoints_that_vanish_while_they_are_counted_do_no_harm(tmp_path):
    """An earlier job of the run may still delete one."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "whole").write_bytes(bytes(1000))
    (folder / "gone").symlink_to(tmp_path / "nowhere")  # listed, but it cannot be read
    assert _bytes_below(folder.parent) == 1000
    with pauseless_deletion(folder.parent):
        for _ in range(1000):
            assert _bytes_below(folder.parent) == 1000


@contextmanager
def pauseless_deletion(folder):
    """Run another process that creates and deletes files without a pause."""
    code = (
        "import pathlib, shutil, sys\nf = pathlib.Path(sys.argv[1], 'step-2')\nwhile True:\n"
        " f.mkdir()\n for n in range(30): (f / str(n)).touch()\n shutil.rmtree(f)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_preflight_says(trainer):
    trainer.run(1, trainer.arguments("sized", "max_steps=1"))
    (checkpoint,) = (folder for folder in (trainer.folder / "sized" / "checkpoints").iterdir() if folder.is_dir())
    config = LiquidConfig.from_pretrained(trainer.folder / "sized" / "model")
    from launcher.training.preflight.memory_estimate import Sizes

    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert 0.7 < size / (CHECKPOINT_BYTES * Sizes.of(config).total) < 1.2


def test_gpus_are_judged_by_what_nvidia_smi_prints():
    healthy = "0, GPU-a0, NVIDIA H100 80GB HBM3, 0, [N/A], Not Active, Not Active, Not Active, 41\n"
    assert judge_health(healthy + healthy.replace("0,", "1,", 1)).message.startswith("2 × NVIDIA H100 80GB HBM3")
    broken = judge_health(healthy + "1, GPU-b1, NVIDIA H100, 3, [N/A], Not Active, Not Active, Not Active, 41\n")
    assert broken.level == RED and "GPU 1 has 3 uncorrected" in broken.message
    hot = judge_health(healthy.replace("Not Active, Not Active, Not Active, 41", "Active, Active, Not Active, 92"))
    assert hot.level == YELLOW and "92 °C" in hot.message
    repaired = judge_health(healthy, "GPU-a0, 0, 0\n")
    waiting = judge_health(healthy, "GPU-a0, Yes, No\n")
    assert repaired.level == GREEN and waiting.level == RED and "GPU 0 has bad memory" in waiting.message
    gpu = "GPU {}: NVIDIA H100 (UUID: GPU-1)\n\t Link 0: 26.562 GB/s\n\t Link 1: {}\n"
    up = "26.562 GB/s"
    assert judge_nvlink(gpu.format(0, up) + gpu.format(1, up)).message == "2 links up on each GPU"
    down = judge_nvlink(gpu.format(0, up) + gpu.format(1, "<inactive>"))
    assert down.level == YELLOW and "GPU 1 has 1 of 2 links" in down.message
    assert judge_nvlink("").level == GREEN


HEALTHY = "{}, GPU-a{}, H100, {}, [N/A], Not Active, Not Active, Not Active, 41\n"


@pytest.mark.parametrize(
    "row",
    [
        "0, GPU-a0, H100, [GPU requires reset], [N/A], Not Active, Not Active, Not Active, 41\n",
        "0, GPU-a0, H100, 0, [N/A], Not Active, Not Active, Not Active, ERR!\n",
        "Unable to determine the device handle for GPU 0000:1B:00.0: GPU is lost.\n",
    ],
)
def test_a_gpu_that_does_not_answer_as_it_should_is_red(row):
    finding = judge_health("\n" + row + HEALTHY.format(1, 1, 0))
    assert finding.level == RED and any(word in finding.message for word in ("requires reset", "ERR!", "is lost"))


def test_each_rank_has_a_gpu_and_each_gpu_a_rank():
    (crowded,) = check_ranks(8, {"SLURM_GPUS_ON_NODE": "1"})
    (idle,) = check_ranks(1, {"SLURM_GPUS_ON_NODE": "8"})
    assert crowded.level == RED and "--gpus-per-node=8" in crowded.fix
    assert idle.level == YELLOW and "--ntasks-per-node=8" in idle.fix
    for of_a_task in ({"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"}):
        assert check_ranks(8, {"SLURM_GPUS_ON_NODE": "1", **of_a_task}) == []
    assert check_ranks(8, {}) == check_ranks(8, {"SLURM_GPUS_ON_NODE": "8"}) == []


def test_only_the_jobs_own_gpus_are_judged():
    table = HEALTHY.format(0, 0, 0) + HEALTHY.format(1, 1, 7)
    assert judge_health(table, own=["0"]).message.startswith("1 × H100")
    assert judge_health(table, own=["GPU-a0"]).level == GREEN
    assert judge_health(table, own=["1"]).level == RED
    lost = judge_health(table, own=["0", "3"])
    assert lost.level == RED and "CUDA_VISIBLE_DEVICES names 3" in lost.message


@pytest.mark.parametrize(
    ("code", "variables", "level"),
    [
        (6, {}, YELLOW),
        (9, {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0"}, YELLOW),
        (6, {"CUDA_VISIBLE_DEVICES": ""}, GREEN),
        (6, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, GREEN),
        (6, {"CUDA_VISIBLE_DEVICES": "0"}, RED),
        (6, {"SLURM_GPUS_ON_NODE": "2"}, RED),
        (15, {}, RED),
    ],
)
def test_a_job_without_gpus_needs_none(tmp_path, monkeypatch, code, variables, level):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho 'No devices were found'\nexit {code}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = check_gpus(variables)
    assert finding.level == level
    assert finding.fix or level == GREEN

"""What can be known wrong before a GPU hour is spent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from launcher.cli import main as lfm
from launcher.commands.preflight import world_of
from launcher.environment import Environment, free_port
from launcher.preflight.findings import GREEN, RED, YELLOW, Finding, merge, suspects
from launcher.preflight.gpus import check_gpus, judge_health
from launcher.preflight.gpus import judge_links as judge_nvlink
from launcher.preflight.machine import CHECKPOINT_BYTES, _bytes_below, check_disk, check_memory
from launcher.preflight.nodes import judge_clocks, judge_links
from model import LiquidConfig


@pytest.fixture
def preflight(trainer, capsys, tmp_path):
    """Runs the command here, and gives its exit code and its lines by check."""

    def run(*arguments: str, deepspeed_config=None) -> tuple[int, dict[str, dict]]:
        settings = trainer.arguments("preflight", *arguments, deepspeed_config=deepspeed_config)
        code = lfm(["preflight", *settings, "--json"])
        report = json.loads(capsys.readouterr().out)
        return code, {line["check"]: line for line in report["checks"]}

    return run


def test_a_sound_run_has_no_red_line(preflight, tmp_path):
    saved = tmp_path / "run" / "preflight.json"
    code, lines = preflight("--nodes", "1", "--ranks-per-node", "2", "--save", str(saved))
    assert code == 0
    assert {line["check"]: line for line in json.loads(saved.read_text())["checks"]} == lines
    assert {"configuration", "DeepSpeed JSON", "data", "validation data", "model", "batch", "experts", "precision",
            "memory", "disk", "versions", "GPUs"} <= set(lines)  # fmt: skip
    assert lines["batch"]["message"] == "4 rows = 2 processes × 2 rows × 1 micro-batches"
    assert all(line["level"] != RED for line in lines.values())
    assert "not known here" in lines["memory"]["message"]  # a login node's says nothing of the run's
    assert preflight()[1]["memory"]["level"] == GREEN


def test_the_table_shows_each_line_with_its_fix(trainer, capsys):
    assert lfm(["preflight", *trainer.arguments("table", "global_batch_rows=5"), "--nodes", "2"]) == 1
    table = capsys.readouterr().out
    (row,) = [line for line in table.splitlines() if "│ batch " in line]
    assert "red" in row and "global_batch_rows is 5, which does not divide over 2 processes" in table
    assert "the nearest that do are 4 and 6" in row


@pytest.mark.parametrize(
    ("arguments", "check", "level", "part"),
    [
        (["max_step=3"], "configuration", RED, "max_step"),
        (["data=/nowhere/at/all", "prepare=null"], "data", RED, "/nowhere/at/all"),
        (["data=/nowhere/at/all", "prepare.source=sample"], "data", YELLOW, "training makes it of sample first"),
        (["model=huge"], "model", RED, "'huge'"),
        (["global_batch_rows=12", "--nodes", "5", "--ranks-per-node", "2"], "batch", RED, "over 10 processes"),
        (["expert_parallel_size=3", "--ranks-per-node", "4"], "experts", YELLOW, "4 experts over 2 of 4 processes"),
        (["expert_parallel_size=4", "--nodes", "2", "--ranks-per-node", "2"], "experts", YELLOW, "crosses nodes of 2"),
        (["output=/proc/nothing"], "disk", RED, "not writable"),
    ],
)
def test_each_kind_of_fault_has_its_line(preflight, arguments, check, level, part):
    code, lines = preflight(*arguments)
    assert code == int(level == RED)
    assert lines[check]["level"] == level
    assert part in lines[check]["message"]
    assert lines[check]["fix"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size", "sequence parallelism"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size", "hpZ"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ["zero_quantized_gradients"]),
        ({"moe": {"enabled": True}, "sequence_parallel_size": 4}, ["native", "moe", "sequence_parallel_size"]),
    ],
)
def test_keys_that_autoep_refuses_under_zero_3_are_named(trainer, preflight, changes, names):
    code, lines = preflight(deepspeed_config=trainer.deepspeed_config("refused", **changes))
    assert code == 1
    assert all(name in lines["DeepSpeed JSON"]["message"] for name in names)
    stage_1 = {**changes, "zero_optimization": {**changes.get("zero_optimization", {}), "stage": 1}}
    stage_1.pop("sequence_parallel_size", None)
    _, lines = preflight(deepspeed_config=trainer.deepspeed_config("allowed", **stage_1))
    assert lines["DeepSpeed JSON"]["level"] == GREEN


def test_data_that_is_not_whole_is_red(trainer, preflight, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trainer.data, copy)
    shard = next(copy.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    _, lines = preflight(f"data={copy}")
    assert lines["data"]["level"] == RED and shard.name in lines["data"]["message"]
    (copy / "index.json").unlink()
    _, lines = preflight(f"data={copy}", "prepare=null")
    assert lines["data"]["level"] == RED and "unfinished" in lines["data"]["message"]


def test_training_begins_with_the_cheap_checks(trainer):
    """One sentence of rank 0 and exit code 2, before DeepSpeed is started."""
    path = trainer.deepspeed_config("quantized", zero_optimization={"stage": 3, "zero_quantized_gradients": True})
    command = [sys.executable, "train.py", *trainer.arguments("refused", deepspeed_config=path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "error: the DeepSpeed JSON has zero_optimization.zero_quantized_gradients" in result.stderr
    assert "Traceback" not in result.stderr and not (trainer.folder / "refused").exists()


def test_a_model_that_cannot_fit_is_red_and_a_tight_one_yellow(tmp_path):
    large = LiquidConfig.from_preset("8b-a1b")
    resolved = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"autoep_size": 1},
    }
    many = Environment(0, 4096, 0, 4096, "test")  # of which each has little of this machine's memory
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
    assert not (tmp_path / "run").exists()  # looking leaves nothing behind
    assert check_disk(LiquidConfig.from_preset("tiny"), str(tmp_path / "run"), keep=10**9).level == YELLOW
    huge = LiquidConfig.from_preset("8b-a1b")
    huge.num_experts = 2**20
    assert check_disk(huge, str(tmp_path / "run"), keep=2).level == RED


def test_checkpoints_that_vanish_while_they_are_counted_do_no_harm(tmp_path):
    """An earlier job of the run may still delete one."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "whole").write_bytes(bytes(1000))
    (folder / "gone").symlink_to(tmp_path / "nowhere")  # listed, and not to be looked at
    assert _bytes_below(folder.parent) == 1000
    with pauseless_deletion(folder.parent):
        for _ in range(1000):
            assert _bytes_below(folder.parent) == 1000


@contextmanager
def pauseless_deletion(folder):
    """Another process that makes and deletes files all the time."""
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
    from launcher.settings.memory_estimate import Sizes

    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert 0.7 < size / (CHECKPOINT_BYTES * Sizes.of(config).total) < 1.2


def test_findings_of_several_nodes_are_one_line_where_they_agree():
    fine, bad = (
        Finding("GPUs", GREEN, "8 × H100"),
        Finding("GPUs", RED, "GPU 3 has 2 uncorrected memory errors", "exclude"),
    )
    data = Finding("data", GREEN, "whole")
    merged = merge({"n1": [data, fine], "n2": [data, bad], "n3": [data, fine]})
    assert [(f.check, f.level, f.nodes) for f in merged] == [
        ("data", GREEN, ()), ("GPUs", GREEN, ("n1", "n3")), ("GPUs", RED, ("n2",)),
    ]  # fmt: skip


def test_what_a_few_nodes_find_wrong_is_their_fault_and_the_rest_a_matter_of_settings():
    names = ["n1", "n2", "n3", "n4"]
    settings = Finding("batch", RED, "does not divide")
    lost_mount, own_disks = (Finding("data", RED, "none", nodes=tuple(names[at:])) for at in (3, 1))
    broken = Finding("GPUs", RED, "GPU 3 has 2 uncorrected memory errors", nodes=("n2",))
    slow = judge_links(names, [5.0, 0.1, 0.1, 5.0])
    late = judge_clocks({"n1": 0.0, "n2": 0.0, "n3": 3600.0})
    assert suspects([lost_mount, broken, slow, late], names) == ["n4", "n2", "n3"]
    assert suspects([broken, settings], names) is None
    assert suspects([own_disks], names) is None
    gone = Finding("GPUs", RED, "nvidia-smi fails")
    assert suspects([gone], names) == []  # all of them: no list of hosts would be left
    assert suspects([gone], ["n1"]) == ["n1"]


def test_the_slow_node_is_named():
    names = ["n1", "n2", "n3", "n4"]
    assert judge_links(names, [5.0, 4.0, 4.5, 5.0]).level == GREEN
    slow = judge_links(names, [5.0, 1.0, 1.2, 5.0])  # n2 to n3 and n3 to n4
    assert slow.level == YELLOW and slow.message.startswith("n3 reaches") and slow.fix == "sbatch --exclude=n3"
    assert judge_links(names, [5.0, 0.1, 0.1, 5.0]).level == RED
    assert judge_links(["n1", "n2"], [5.0, 1.0]).level == YELLOW


def test_a_clock_that_is_off_is_named():
    assert judge_clocks({"n1": 0.0, "n2": 0.002, "n3": -0.5}).level == GREEN
    finding = judge_clocks({"n1": 0.0, "n2": 7.0, "n3": 7.0})
    assert finding.level == YELLOW and "n1 is -7.0 s off" in finding.message
    assert judge_clocks({"n1": 0.0, "n2": 0.0, "n3": 3600.0}).level == RED


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


def test_a_neighbours_gpu_is_not_this_jobs():
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


class Given:
    """Options as the command line gives them."""

    def __init__(self, **given):
        self.__dict__ |= given


@pytest.mark.parametrize(
    ("given", "ranks", "variables", "world"),
    [
        ({}, (1, 1), {}, (1, 1)),
        ({"nodes": 4, "ranks_per_node": 8}, (1, 1), {}, (32, 8)),
        # in the batch script
        ({}, (1, 1), {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8"}, (8, 4)),
        ({}, (1, 1), {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "3"}, (6, 3)),
        # one process a node, by srun
        ({"ranks_per_node": 8}, (4, 1), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, (32, 8)),
        ({}, (4, 2), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, (4, 2)),
    ],
)
def test_the_world_is_that_of_the_run_to_come(given, ranks, variables, world):
    size, per_node = ranks
    found = world_of(Given(**given), Environment(0, size, 0, per_node, "test"), variables)
    assert (found.world_size, found.local_world_size) == world


def start_nodes(count: int, arguments: list[str], before_last: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """The command as one process a node, each with srun's variables; `before_last` stands before the last one's."""
    processes, port = [], free_port()
    for rank in range(count):
        variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        variables |= {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(count), "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
                      "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})", "SLURM_JOB_ID": "7",
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        command = [sys.executable, "-m", "launcher.cli", "preflight", *arguments]
        command = [*before_last, *command] if rank == count - 1 else command
        processes.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return processes


def results_of(processes: list[subprocess.Popen]) -> tuple[list[int], dict[str, list[dict]]]:
    """Every process's exit code, and the lines of rank 0's JSON by check."""
    written = [process.communicate(timeout=200) for process in processes]
    assert written[0][0], written[0][1]
    assert not any(out for out, _ in written[1:])
    lines = {}
    for line in json.loads(written[0][0])["checks"]:
        lines.setdefault(line["check"], []).append(line)
    return [process.returncode for process in processes], lines


def test_nodes_are_checked_together(trainer):
    """As `srun --ntasks-per-node=1` starts it, for a run of two ranks a node."""
    codes, lines = results_of(start_nodes(2, trainer.arguments("nodes", "--json", "--ranks-per-node", "2")))
    assert codes == [0, 0]
    assert all(len(found) == 1 for found in lines.values())
    lines = {check: line for check, (line,) in lines.items()}
    assert lines["batch"]["message"].startswith("4 rows = 4 processes")
    assert {"clocks", "run folder", "shared data", "all-reduce", "all-to-all", "links"} <= set(lines)
    assert lines["run folder"]["level"] == lines["shared data"]["level"] == lines["clocks"]["level"] == GREEN
    assert float(lines["all-reduce"]["message"].split()[0]) > 0
    assert not (trainer.folder / "nodes").exists()


@pytest.mark.slow
def test_a_node_that_does_not_share_the_file_system_is_named(trainer, tmp_path):
    """The last node has an empty disk of its own where the others have data and runs."""
    shared = tmp_path / "shared"
    shutil.copytree(trainer.data, shared / "data")
    other_disk = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {shared} && exec "$@"', "sh")
    if subprocess.run([*other_disk, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    arguments = trainer.arguments(
        "unused", "--json", f"data={shared / 'data'}", "prepare=null", f"output={shared / 'run'}"
    )
    codes, lines = results_of(start_nodes(2, arguments, other_disk))
    assert codes == [1, 1]
    (bad,) = [line for line in lines["data"] if line["level"] == RED]
    assert bad["nodes"] == [f"{os.uname().nodename} rank 1"]
    (folder,), (data,) = lines["run folder"], lines["shared data"]
    assert folder["level"] == RED and "rank 1 do not see the others' files" in folder["message"]
    assert data["level"] == RED and "rank 1" in data["message"]


@pytest.mark.slow
def test_a_node_that_is_slow_to_reach_is_named(trainer):
    """A process that runs for so little at a time, from when the network is measured, that no transfer fits in."""
    folder = trainer.folder / "slow"
    folder.mkdir()
    untouched = folder.stat().st_mtime_ns
    processes = start_nodes(3, trainer.arguments("slow", "--json", "global_batch_rows=6"))
    deadline = time.monotonic() + 150
    while folder.stat().st_mtime_ns == untouched:  # until the nodes look for one another's files, just before
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    while processes[2].poll() is None and time.monotonic() < deadline:
        for number, seconds in ((signal.SIGSTOP, 0.025), (signal.SIGCONT, 0.002)):
            processes[2].send_signal(number)
            time.sleep(seconds)
    _, lines = results_of(processes)
    (links,) = lines["links"]
    assert links["level"] in (YELLOW, RED)
    assert links["fix"] == f"sbatch --exclude={os.uname().nodename} rank 2"

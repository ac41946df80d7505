"""Preflight on several nodes: their merged findings, and which nodes are at fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launcher.environment import free_port
from launcher.training.preflight.findings import GREEN, RED, YELLOW, Finding, merge, suspects
from launcher.training.preflight.nodes import judge_clocks, judge_links
from tests import fork_server


def test_equal_findings_of_several_nodes_are_one_line():
    fine, bad = (
        Finding("GPUs", GREEN, "8 × H100"),
        Finding("GPUs", RED, "GPU 3 has 2 uncorrected memory errors", "exclude"),
    )
    data = Finding("data", GREEN, "whole")
    merged = merge({"n1": [data, fine], "n2": [data, bad], "n3": [data, fine]})
    assert [(f.check, f.level, f.nodes) for f in merged] == [
        ("data", GREEN, ()),
        ("GPUs", GREEN, ("n1", "n3")),
        ("GPUs", RED, ("n2",)),
    ]


def test_faults_of_a_few_nodes_make_them_suspect_and_shared_faults_are_of_settings():
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
    assert suspects([gone], names) == []  # all nodes: excluding them would leave none
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
    of_two = judge_clocks({"n1": 40.0, "n2": 0.0})  # either may be wrong
    assert of_two.level == RED and "n1 and n2 are 40.0 s apart" in of_two.message
    assert suspects([of_two], ["n1", "n2"]) == []


# `lfm preflight` with a shorter wait for files that another node wrote.
IMPATIENT = """
import sys
from launcher.cli import main
from launcher.training.preflight import nodes
nodes.VISIBLE_WITHIN = 5
sys.exit(main(sys.argv[1:]))
"""


def start_nodes(count: int, arguments: list[str], before_last: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """Start the command on `count` nodes with srun's variables; `before_last` is put before the last node's command."""
    processes, port = [], free_port()
    for rank in range(count):
        variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        variables |= {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(count), "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
                      "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})", "SLURM_JOB_ID": "7",
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        command = [sys.executable, "-c", IMPATIENT, "preflight", *arguments]
        start = fork_server.Popen
        if before_last and rank == count - 1:
            start, command = subprocess.Popen, [*before_last, *command]
        processes.append(start(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return processes


def results_of(processes: list[subprocess.Popen]) -> tuple[list[int], dict[str, list[dict]]]:
    """Return every process's exit code, and the lines of rank 0's JSON by check."""
    written = [process.communicate(timeout=200) for process in processes]
    assert written[0][0], written[0][1]
    assert not any(out for out, _ in written[1:])
    lines = {}
    for line in json.loads(written[0][0])["checks"]:
        lines.setdefault(line["check"], []).append(line)
    return [process.returncode for process in processes], lines


def test_nodes_are_checked_together(trainer):
    """The command is started as by `srun --ntasks-per-node=1`, for a run with two ranks a node."""
    codes, lines = results_of(start_nodes(2, trainer.arguments("nodes", "--json", "--ranks-per-node", "2")))
    assert codes == [0, 0]
    # Free disk space changes while other programs write, so two nodes may report different numbers.
    assert {check for check, found in lines.items() if len(found) > 1} <= {"disk"}
    lines = {check: found[0] for check, found in lines.items()}
    assert lines["batch"]["message"].startswith("4 rows = 4 processes")
    assert {"clocks", "run folder", "shared data", "all-reduce", "all-to-all", "links"} <= set(lines)
    assert lines["run folder"]["level"] == lines["shared data"]["level"] == lines["clocks"]["level"] == GREEN
    assert float(lines["all-reduce"]["message"].split()[0]) > 0
    assert not (trainer.folder / "nodes").exists()


@pytest.mark.slow
def test_a_node_that_does_not_share_the_file_system_is_named(trainer, tmp_path):
    """The last node has an empty disk in the place of the shared folder with data and runs."""
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
    """While the network is measured, one process is stopped so often that no transfer fits between two stops."""
    folder = trainer.folder / "slow"
    folder.mkdir()
    untouched = folder.stat().st_mtime_ns
    processes = start_nodes(3, trainer.arguments("slow", "--json", "global_batch_rows=6"))
    deadline = time.monotonic() + 150
    while folder.stat().st_mtime_ns == untouched:  # the nodes look for one another's files just before
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    deadline = time.monotonic() + 150  # a slow start must not shorten the measurement
    while processes[2].poll() is None and time.monotonic() < deadline:
        for number, seconds in ((signal.SIGSTOP, 0.025), (signal.SIGCONT, 0.002)):
            processes[2].send_signal(number)
            time.sleep(seconds)
    _, lines = results_of(processes)
    (links,) = lines["links"]
    assert links["level"] in (YELLOW, RED)
    assert links["fix"] == f"sbatch --exclude={os.uname().nodename} rank 2"

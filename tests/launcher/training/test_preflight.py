"""Preflight finds faults before a GPU hour is spent."""

import json
import re
import shutil
import sys

import pytest

from launcher.cli import main as lfm
from launcher.commands.preflight import world_of
from launcher.environment import Environment
from launcher.training.preflight.findings import GREEN, RED, YELLOW
from tests import fork_server


@pytest.fixture
def preflight(trainer, capsys, tmp_path):
    """Run the command in this process; return its exit code and its lines by check."""

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
    assert "not known here" in lines["memory"]["message"]  # a login node's memory is not the run's
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
        (["data=/nowhere/at/all", "prepare.source=sample"], "data", YELLOW, "training prepares it from sample first"),
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
    ("changes", "named"),
    [
        ({"sequence_parallel_size": 2}, "sequence_parallel_size, which is not supported: sequence parallelism"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients",
        ),
        (
            {"moe": {"enabled": True}},
            "moe, which is not supported: the expert_parallel section distributes the experts",
        ),
    ],
)
def test_keys_that_are_not_supported_are_named_once(trainer, preflight, changes, named):
    code, lines = preflight(deepspeed_config=trainer.deepspeed_config("refused", **changes))
    assert code == 1
    assert [check for check, line in lines.items() if named in line["message"]] == ["DeepSpeed JSON"]


def test_incomplete_data_is_red(trainer, preflight, tmp_path):
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
    """Rank 0 prints one sentence and exits with code 2 before DeepSpeed is started."""
    path = trainer.deepspeed_config("quantized", zero_optimization={"stage": 3, "zero_quantized_gradients": True})
    command = [sys.executable, "train.py", *trainer.arguments("refused", deepspeed_config=path)]
    result = fork_server.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert re.search("error: .*quantized.json has zero_optimization.zero_quantized_gradients, which", result.stderr)
    assert "Traceback" not in result.stderr and not (trainer.folder / "refused").exists()


class Given:
    """The parsed options of the command line."""

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
def test_the_world_size_is_that_of_the_planned_run(given, ranks, variables, world):
    size, per_node = ranks
    found = world_of(Given(**given), Environment(0, size, 0, per_node, "test"), variables)
    assert (found.world_size, found.local_world_size) == world

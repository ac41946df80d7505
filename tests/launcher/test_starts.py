"""Commands start without the libraries that take seconds to import, and leave the process that calls them as it was."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main as lfm

PROJECT = Path(__file__).parents[2]
SLOW = {"torch", "transformers", "deepspeed"}
LFM = [sys.executable, "-m", "launcher.cli"]


def imported(command: list[str], code: int = 0, **variables: str) -> tuple[set[str], int]:
    """Run a command; return the top-level modules that it or its workers imported, and the number of processes."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", **variables}  # every Python process then lists them
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr[-3000:]
    modules = re.findall(r"^import time:[^|]+\|[^|]+\|\s+([\w.]+)", result.stderr, re.MULTILINE)
    return {name.split(".")[0] for name in modules}, modules.count("site")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, set[str], int]:
    """A shard folder that two worker processes wrote, the modules they imported, and the number of processes."""
    folder = tmp_path_factory.mktemp("starts")
    for part in range(2):
        rows = [{"question": f"What is {part} + {n}?", "answer": str(part + n), "source": "s"} for n in range(200)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*LFM, "prepare", str(folder), "--out", str(folder / "out"), "--tokenizer", "train", "--workers", "2"]
    return folder / "out", *imported([*command, "--seq-len", "64", "--validation-share", "0.1"])


def test_prepare_and_its_workers_import_no_torch(shards):
    _, modules, processes = shards
    assert processes >= 3  # the command and two workers
    assert "polars" in modules and not SLOW & modules


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["verify", "--workers", "2"], "numpy"),
        (["inspect"], "numpy"),
        (["inspect", "--png", "histograms.png"], "matplotlib"),
    ],
)
def test_commands_on_a_shard_folder_import_no_torch(shards, tmp_path, arguments, needed):
    arguments = [str(tmp_path / word) if word.endswith(".png") else word for word in arguments]
    modules, _ = imported([*LFM, *arguments, str(shards[0])])
    assert needed in modules and not SLOW & modules


def test_submit_fetch_and_a_batch_jobs_decisions_import_no_torch(tmp_path):
    commands = {
        "submit": ([*LFM, "submit", "--dry-run", "train"], 0),
        "fetch": ([*LFM, "fetch", "--out", str(tmp_path / "hub")], 2),  # no server listens there
        "batch job": (
            [sys.executable, "-m", "launcher.cluster.batch_job", "folder", "--deepspeed_config", "x.json"],
            0,
        ),
    }
    for name, (command, code) in commands.items():
        modules, _ = imported(command, code, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DISABLE_TELEMETRY="1")
        assert (name == "fetch") == ("huggingface_hub" in modules), name
        assert not SLOW & modules, name


def test_the_help_of_each_command_imports_no_slow_library():
    result = subprocess.run([*LFM, "--help"], cwd=PROJECT, capture_output=True, text=True, check=True)
    names = re.findall(r"^    (\w+)", result.stdout, re.MULTILINE)
    assert {"prepare", "verify", "inspect", "fetch", "submit", "preflight", "export", "serve"} <= set(names)
    for arguments in ([], *([name] for name in names)):
        modules, _ = imported([*LFM, *arguments, "--help"])
        assert not {*SLOW, "numpy", "polars", "matplotlib", "huggingface_hub"} & modules, arguments


def test_a_command_leaves_the_signal_handlers_of_its_process_as_they_were(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert lfm(["prepare", "sample", "--out", str(tmp_path / "data"), "--seq-len", "64", "--workers", "1"]) == 0
    with pytest.raises(SystemExit):
        lfm(["prepare", str(tmp_path / "nothing"), "--out", str(tmp_path / "other")])
    assert [signal.getsignal(number) for number in numbers] == before

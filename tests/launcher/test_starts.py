"""Commands start without the libraries that take seconds to import; in their worker processes too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SLOW = {"torch", "transformers", "deepspeed"}
LFM = [sys.executable, "-m", "launcher.cli"]


def imported(command: list[str], code: int = 0, **variables: str) -> tuple[set[str], int]:
    """Run a command; gives the top-level modules that it or its workers imported, and how many processes there were."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", **variables}  # every Python process then lists them
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr[-3000:]
    modules = re.findall(r"^import time:[^|]+\|[^|]+\|\s+([\w.]+)", result.stderr, re.MULTILINE)
    return {name.split(".")[0] for name in modules}, modules.count("site")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, set[str], int]:
    """A shard folder that two worker processes have made, and what they imported."""
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
    [(["verify", "--workers", "2"], "numpy"), (["inspect"], "numpy"), (["inspect", "--png", "histograms.png"], "matplotlib")],
)  # fmt: skip
def test_commands_on_a_shard_folder_import_no_torch(shards, tmp_path, arguments, needed):
    arguments = [str(tmp_path / word) if word.endswith(".png") else word for word in arguments]
    modules, _ = imported([*LFM, *arguments, str(shards[0])])
    assert needed in modules and not SLOW & modules


def test_submit_fetch_and_a_batch_jobs_decisions_import_no_torch(tmp_path):
    commands = {
        "submit": ([*LFM, "submit", "--dry-run", "train"], 0),
        "fetch": ([*LFM, "fetch", "--out", str(tmp_path / "hub")], 2),  # nobody listens there
        "batch job": ([sys.executable, "-m", "launcher.submission.batch_job", "folder", "--deepspeed_config", "x.json"], 0),
    }  # fmt: skip
    for name, (command, code) in commands.items():
        modules, _ = imported(command, code, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DISABLE_TELEMETRY="1")
        assert (name == "fetch") == ("huggingface_hub" in modules), name
        assert not SLOW & modules, name


def test_the_help_of_each_command_imports_no_library_that_takes_time():
    result = subprocess.run([*LFM, "--help"], cwd=PROJECT, capture_output=True, text=True, check=True)
    names = re.findall(r"^    (\w+)", result.stdout, re.MULTILINE)
    assert {"prepare", "verify", "inspect", "fetch", "submit", "preflight", "export", "serve"} <= set(names)
    for arguments in ([], *([name] for name in names)):
        modules, _ = imported([*LFM, *arguments, "--help"])
        assert not {*SLOW, "numpy", "polars", "matplotlib", "huggingface_hub"} & modules, arguments


AT_FIRST_TORCH = """
import os, sys
def watch(event, told):
    if event == "import" and told[0] == "torch":
        os.write(1, os.environ.get("GOMP_SPINCOUNT", "").encode())
        os._exit(0)
sys.addaudithook(watch)
import {module}, torch
"""


@pytest.mark.parametrize("module", ["train", "launcher.cli", "launcher.engine"])
def test_openmps_threads_are_told_not_to_spin_before_torch_is_loaded(module):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, expected in ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        command = [sys.executable, "-c", AT_FIRST_TORCH.format(module=module)]
        result = subprocess.run(command, cwd=PROJECT, env=environment | given, capture_output=True, text=True, timeout=60)
        assert result.stdout == expected, result.stderr

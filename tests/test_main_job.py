"""The README's main job, and the preparation of the real corpus if it is on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.environment import free_port

PROJECT = Path(__file__).parents[1]
CORPUS = PROJECT.parent / "shared" / "data"


def run(*command: str) -> str:
    """Run a command of this Python environment, which must succeed, and return its output."""
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    environment.pop("LOCAL_SIZE", None)  # DeepSpeed would take it for the number of processes on this machine
    result = subprocess.run(
        command, cwd=PROJECT, env=environment, text=True, timeout=1500, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_run_learns_the_sample(tmp_path):
    """After the README's command at least two thirds of the held-out answers are exactly right; usually four fifths are."""
    folder = tmp_path / "run"
    launcher = ["deepspeed", "--master_port", str(free_port())]
    training = ["train.py", "--deepspeed_config", "ds_configs/zero3.json"]
    printed = run(*launcher, *training, f"data={tmp_path / 'data'}", "prepare.source=sample", f"output={folder}")
    if not re.search(r"num_local_procs=([2-9]|\d\d)", printed):  # the launcher starts one per NUMA node
        assert "expert_parallel_size 2 does not fit 1 process" in printed
    run("lfm", "export", str(folder), "--out", str(folder / "export"))
    printed = run("lfm", "evaluate", str(folder / "export"), "--questions", "sample", "--show", "3")
    right, total = map(int, re.search(r"(\d+) of (\d+) held-out answers", printed).groups())
    assert total > 150
    assert right >= total * 2 / 3, printed


@pytest.mark.slow
def test_every_row_of_the_real_corpus_is_accounted_for(tmp_path):
    if not CORPUS.is_dir():
        pytest.skip(f"the corpus is not at {CORPUS}")
    source, tokenizer = str(CORPUS / "webinstruct_dev"), str(CORPUS / "led_tokenizer")
    printed = run("lfm", "prepare", source, "--tokenizer", tokenizer, "--out", str(tmp_path / "web"))
    numbers = re.search(
        r"([\d,]+) rows = ([\d,]+) packed \+ ([\d,]+) for validation \+ ([\d,]+) dropped", printed
    ).groups()
    rows, packed, held_out, dropped = (int(number.replace(",", "")) for number in numbers)
    assert rows == 96_898 == packed + held_out + dropped
    run("lfm", "verify", str(tmp_path / "web"))

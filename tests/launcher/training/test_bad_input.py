"""A user's mistake gives one sentence, exit code 2 and no traceback in the real commands."""

import json
import os
import subprocess
import sys

import pytest

from launcher.cli import main as lfm
from launcher.environment import free_port
from tests import fork_server


def lfm_refuses(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        lfm(list(arguments))
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    sentence = errors[errors.index("error: ") :]
    assert sentence.count("\n") == 1, sentence
    return sentence


def test_prepare_refuses_sources_that_it_cannot_use(capsys, tmp_path):
    wrong_columns = tmp_path / "wrong.jsonl"
    wrong_columns.write_text(json.dumps({"prompt": "a", "reply": "b"}) + "\n")
    corrupt = tmp_path / "corrupt.parquet"
    corrupt.write_bytes(b"PAR1 this is not a parquet file PAR1")
    out = ["--tokenizer", "train", "--out", str(tmp_path / "out")]
    columns = lfm_refuses(capsys, "prepare", str(wrong_columns), *out)
    assert all(part in columns for part in (str(wrong_columns), "question", "answer", "prompt"))
    assert str(corrupt) in lfm_refuses(capsys, "prepare", str(corrupt), *out)
    assert "missing.jsonl" in lfm_refuses(capsys, "prepare", str(tmp_path / "missing.jsonl"), *out)
    assert not (tmp_path / "out" / "index.json").exists()


def test_commands_refuse_folders_of_the_wrong_kind(capsys, tmp_path):
    nothing = str(tmp_path / "nothing")
    assert "nothing" in lfm_refuses(capsys, "verify", nothing)
    assert "no complete checkpoint" in lfm_refuses(capsys, "export", nothing, "--out", str(tmp_path / "model"))
    assert "neither a model folder" in lfm_refuses(capsys, "generate", nothing, "why?")
    (tmp_path / "mine.txt").write_text("keep me")
    (tmp_path / "config.json").write_text("{}")
    assert "not an earlier export (it has mine.txt)" in lfm_refuses(capsys, "export", nothing, "--out", str(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert "is a file" in lfm_refuses(capsys, "export", nothing, "--out", str(tmp_path / "mine.txt"))
    assert "neither a model folder" in lfm_refuses(capsys, "generate", str(tmp_path), "why?")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["max_step=3"], ["unknown key max_step", "max_steps"]),
        (["data=/nowhere/at/all", "prepare=null"], ["/nowhere/at/all"]),
        (["model=huge"], ["'huge'", "tiny"]),
        (["init_from=/nowhere"], ["/nowhere", "lfm export"]),
    ],
)
def test_training_refuses_before_it_starts(trainer, overrides, parts):
    command = [sys.executable, "train.py", *trainer.arguments("refused", *overrides)]
    result = fork_server.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert all(part in sentence for part in parts), sentence


def test_a_model_with_a_layer_that_autoep_misses_is_refused(trainer):
    """AutoEP converts only layers that match its pattern; the experts of others would be whole on every rank."""
    program = (
        "import runpy\nfrom launcher.training.setup.json_keys import AUTOEP\n"
        "AUTOEP['moe_layer_pattern'] = r'model\\.layers\\.0\\.moe'\nrunpy.run_path('train.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, *trainer.arguments("partial")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "1 of 2 mixtures of experts became expert-parallel" in result.stderr
    status = json.loads((trainer.folder / "partial" / "status.json").read_text())
    assert (
        status["state"] == "failed" and "1 of 2 mixtures" in status["reason"]
    )  # there is a status even before the first step


def test_two_ranks_under_the_real_launcher_give_one_sentence_and_end(trainer):
    """The batch does not divide under `deepspeed --num_gpus 2`: rank 0 prints the error, and no rank hangs."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "train.py"]
    command += trainer.arguments("refused", "global_batch_rows=5")
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode != 0
    printed = result.stdout + result.stderr
    assert printed.count("error: global_batch_rows is 5, which does not divide over 2 processes") == 1
    assert "Traceback" not in printed

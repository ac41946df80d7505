"""`lfm submit`: the calls of sbatch, the site's settings and a sweep's table; tests/cluster submits real jobs."""

import itertools
import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from launcher.cli import main as lfm
from launcher.cluster.sbatch import check_setting
from launcher.cluster.sweep import sweep, write_runs
from launcher.errors import ConfigurationError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("LFM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(Path(__file__).parents[3])
    return tmp_path


def shown(capsys, *words: str) -> list[list[str]]:
    """Return the calls of sbatch that a dry run shows."""
    lfm(["submit", "--dry-run", *words])
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for before, line in itertools.pairwise(lines) if before == "# sbatch command:"]


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        lfm(["submit", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_dry_run_shows_the_script_and_the_call(capsys):
    lfm(
        [
            "submit",
            "--dry-run",
            "--nodes",
            "4",
            "--gpus",
            "8",
            "--sbatch=--exclude=node7",
            "train",
            "--config",
            "a b.yaml",
            "seed=2",
        ]
    )
    out = capsys.readouterr().out
    assert Path("slurm/train.sbatch").read_text() in out
    assert (
        "sbatch --parsable --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --mem=0 --exclude=node7 slurm/train.sbatch "
        "--config 'a b.yaml' seed=2\n"
    ) in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpus", "1"], []),
        (["--gpus", "8"], ["--mem=0"]),
        (["--gpus", "8", "--mem", "200G"], ["--mem=200G"]),
        (["--gpus", "8", "--sbatch=--mem=100G"], ["--mem=100G"]),
    ],
)
def test_a_job_of_many_gpus_gets_the_nodes_whole_memory(capsys, words, named):
    (call,) = shown(capsys, *words, "train")
    assert [word for word in call if word.startswith("--mem")] == named


def test_a_sites_settings_are_written_once_and_apply_to_every_job(capsys, home, monkeypatch):
    lfm(["submit", "--site", "partition=gpu", "modules=cuda/12.4 gcc/12", "account=x"])
    lfm(["submit", "--site", "account="])
    assert yaml.safe_load((home / "lfm" / "site.yaml").read_text()) == {
        "partition": "gpu",
        "modules": "cuda/12.4 gcc/12",
    }
    capsys.readouterr()
    expected = ["LFM_MODULES=cuda/12.4 gcc/12", "sbatch", "--parsable", "--partition=gpu", "slurm/prepare.sbatch"]
    assert shown(capsys, "prepare") == [expected]
    monkeypatch.setenv("LFM_MODULES", "cuda/13")  # the shell's variables take precedence
    assert shown(capsys, "prepare") == [expected[1:]]
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    assert shown(capsys, "prepare") == [["sbatch", "--parsable", "slurm/prepare.sbatch"]]
    assert "pardition" in refused(capsys, "--site", "pardition=gpu")
    (home / "lfm" / "site.yaml").write_text("- gpu\n")
    assert "fix or delete it" in refused(capsys, "--dry-run", "train")


def test_values_in_a_hand_written_site_file_are_texts(capsys, home):
    (home / "lfm").mkdir()
    file = home / "lfm" / "site.yaml"
    file.write_text("partition:\naccount: 007\nqos: yes\nmodules: [cuda/12.4, gcc]\n")
    words = ["LFM_MODULES=cuda/12.4 gcc", "sbatch", "--parsable", "--account=007", "--qos=yes", "slurm/prepare.sbatch"]
    assert shown(capsys, "prepare") == [words]
    file.write_text("account: {a: b}\n")
    assert "has a dict as account" in refused(capsys, "--dry-run", "prepare")


def test_the_shells_python_replaces_the_sites(capsys, monkeypatch):
    lfm(["submit", "--site", "conda=train", "interface=ib0"])
    capsys.readouterr()
    assert shown(capsys, "prepare")[0][:2] == ["LFM_INTERFACE=ib0", "LFM_CONDA=train"]
    monkeypatch.setenv("LFM_VENV", "/other")
    assert shown(capsys, "prepare")[0][:2] == ["LFM_INTERFACE=ib0", "sbatch"]


def test_each_job_of_a_chain_waits_for_the_one_before(capsys):
    words = [
        "--nodes",
        "4",
        "--chain",
        "prepare",
        "rows",
        "--out",
        "data/x",
        "then",
        "train",
        "output=runs/x",
        "then",
        "evaluate",
    ]
    prepare, train, evaluate = shown(capsys, *words, "runs/x")
    assert prepare == ["sbatch", "--parsable", "slurm/prepare.sbatch", "rows", "--out", "data/x"]
    waiting = ["--dependency=afterok:<prepare>", "--kill-on-invalid-dep=yes"]
    assert train == ["sbatch", "--parsable", "--nodes=4", *waiting, "slurm/train.sbatch", "output=runs/x"]
    assert evaluate[2] == "--dependency=afterok:<train>" and evaluate[-1] == "runs/x"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fly"], "takes prepare, train, evaluate, not 'fly'"),
        (["train", "then", "evaluate", "x"], "needs --chain"),
        (["--chain", "train", "then"], "not nothing"),
        (["--nodes", "-3", "train"], "--nodes is -3; it must be at least 1"),
        (["--gpus", "-1", "train"], "--gpus is -1; it must be at least 0"),
        (["--sweep", "seed=1", "evaluate", "x"], "--sweep works only with train"),
        (
            ["--gpus", "8", "--sbatch=--mem-per-gpu=80G", "train"],
            "--mem-per-gpu conflicts with the batch scripts; give --mem",
        ),
        (["--table", "/nowhere"], "/nowhere is not the folder of a sweep"),
    ],
)
def test_a_wrong_call_is_an_error_of_one_sentence(capsys, words, sentence):
    assert sentence in refused(capsys, "--dry-run", *words)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("profile.steps=[1, 2],[3,4]", ["[1, 2]", "[3,4]"]),
        ("data={a: 1, b: [2, 3]},x", ["{a: 1, b: [2, 3]}", "x"]),
        ("run_name='a,b',\"c'd,e\"", ["'a,b'", '"c\'d,e"']),
        ("seed=1,2", ["1", "2"]),
    ],
)
def test_a_swept_value_may_be_a_list(setting, values):
    assert check_setting(setting)[1] == values


def test_a_sweeps_table_job_has_the_runs_account_but_not_their_excluded_nodes(capsys, tmp_path):
    given = ["--sbatch=--account=x", "--sbatch=--exclude=node7"]
    array, table = shown(capsys, *given, "--sweep", "seed=1,2", "train", f"output={tmp_path}")
    assert {"--account=x", "--exclude=node7"} <= set(array)
    assert "--account=x" in table and "--exclude=node7" not in table


def test_a_sweep_is_one_array_with_a_folder_for_each_run(tmp_path, capsys):
    output = tmp_path / "a sweep"
    runs, job = sweep(["seed=1,2", "loss.focal=0.1,0.2"], ["--config", "x.yaml"], output, {}, ["--nodes=1"])
    assert runs[2] == ["seed=2", "loss.focal=0.1", f"output={output}/seed=2,loss.focal=0.1"]
    assert job.words == ["sbatch", "--parsable", "--nodes=1", "--array=0-3", "slurm/train.sbatch", "--config", "x.yaml"]
    assert job.variables == {"LFM_SWEEP": f"{output}/sweep/1"}
    write_runs(runs, Path(job.variables["LFM_SWEEP"]))
    assert (output / "sweep" / "1" / "2").read_text().splitlines() == runs[2]
    (output / "seed=1,loss.focal=0.2").mkdir()
    (output / "seed=1,loss.focal=0.2" / "status.json").write_text(json.dumps({"state": "failed", "step": 3}))
    lfm(["submit", "--table", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| seed | loss.focal | state | step | train loss | held-out loss |"
    assert lines[2].startswith("| 1 | 0.1 | not started |")
    assert lines[3].startswith("| 1 | 0.2 | failed | 3 |")
    assert (output / "table.md").read_text().splitlines() == lines
    # A second sweep keeps the settings of the first, which its tasks may still have to read, and adds to the table.
    again, job = sweep(["seed=2,3"], [], output, {}, [])
    write_runs(again, Path(job.variables["LFM_SWEEP"]))
    assert (output / "sweep" / "1" / "2").read_text().splitlines() == runs[2]
    assert (output / "sweep" / "2" / "1").read_text().splitlines() == again[1]
    with pytest.raises(ConfigurationError, match="run this command again"):
        write_runs(again, Path(job.variables["LFM_SWEEP"]))
    lfm(["submit", "--table", str(output)])
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 3 |  | not started |")
    assert "'seed=' is not a sweep" in refused(capsys, "--dry-run", "--sweep", "seed=", "train", f"output={output}")

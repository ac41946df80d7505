"""The verdict on a batch job, from the files in its run folder."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

from launcher.cluster.batch_job import JobLog, begin, check, end, run_folder
from launcher.config_file import load_run_config
from launcher.errors import ConfigurationError
from train import parse_arguments

HOSTS = ["node1", "node2"]


@pytest.fixture
def log(tmp_path) -> JobLog:
    log = JobLog(tmp_path / "run", "7", 1)
    assert begin(log, HOSTS) == "go"
    return log


def status(log: JobLog, state: str, **facts) -> None:
    facts = {"state": state, "step": 3, "reason": "", "job": "7", "restart": 1, **facts}
    (log.folder / "status.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("state", "facts", "code", "signal", "verdict"),
    [
        ("done", {}, 0, "", "done"),
        ("done", {}, 137, "", "done"),  # the first rank to leave made srun kill the rest
        ("stopped", {}, 137, "USR1", "retry"),
        ("stopped", {}, 75, "", "retry"),  # only the ranks got the signal
        ("failed", {}, 1, "", "fail"),
        ("failed", {}, 1, "USR1", "fail"),
        ("failed", {"suspects": ["node2"]}, 137, "", "retry node2"),
        ("failed", {"suspects": ["elsewhere; touch x"]}, 137, "", "retry"),
        ("failed", {"suspects": ["node2"]}, 77, "USR1", "retry"),  # the signal killed a rank that had no handler yet
        ("failed", {"suspects": []}, 77, "", "retry"),
        ("failed", {"suspects": []}, 137, "", "fail"),
        ("failed", {"suspects": ["node1.cluster.example"]}, 143, "", "retry node1"),
        ("running", {}, 137, "", "fail"),
        ("running", {}, 76, "", "retry"),
        ("done", {"restart": 0}, 1, "", "fail"),  # written by an earlier attempt
        ("done", {"job": "6"}, 2, "", "fail"),
        ("stopped", {"restart": 0}, 138, "USR1", "retry"),  # asked to stop while Python was starting
        ("starting", {}, 138, "USR1", "retry"),  # asked to stop while rank 0 was planning
        ("starting", {}, 1, "", "fail"),
        ("starting", {}, 77, "", "retry"),
        ("stopped", {"restart": 0}, 138, "", "fail"),
        ("stopped", {"restart": 0}, 2, "USR1", "fail"),
    ],
)
def test_the_runs_status_counts_more_than_sruns_exit_code(log, state, facts, code, signal, verdict):
    status(log, state, **facts)
    assert end(log, code, signal, HOSTS) == verdict


def preflight(log: JobLog, level: str, suspects: list[str] | None) -> None:
    (log.folder / "preflight.json").write_text(json.dumps({"level": level, "suspects": suspects, "checks": []}))


@pytest.mark.parametrize(
    ("level", "suspects", "verdict"),
    [
        ("green", [], "go"),
        ("yellow", [], "go"),
        ("red", None, "fail"),
        ("red", ["node2.cluster.example"], "retry node2"),
        ("red", [], "retry"),
    ],
)
def test_preflight_fails_a_job_only_for_its_settings(log, level, suspects, verdict):
    preflight(log, level, suspects)
    assert check(log, 1, HOSTS) == verdict


def test_an_interrupted_preflight_does_not_end_the_job(log, capsys):
    preflight(log, "red", None)
    assert begin(log, HOSTS) == "go"  # the report of an earlier start does not count
    assert check(log, 137, HOSTS) == "go"
    assert "did not finish (code 137)" in capsys.readouterr().err


def test_the_third_red_preflight_holds_the_job(log):
    for verdict in ("retry node2", "retry node2", "hold"):
        preflight(log, "red", ["node2"])
        assert check(log, 1, HOSTS) == verdict
        begin(log, HOSTS)


def test_stacks_written_by_this_attempt_mean_a_hang(log, capsys):
    status(log, "running")
    stacks = log.folder / "stacks"
    stacks.mkdir()
    (stacks / "rank-0.txt").touch()  # a killed rank leaves an empty one
    (stacks / "rank-1.txt").write_text("Thread 1")
    os.utime(stacks / "rank-1.txt", (time.time() - 3600,) * 2)
    assert end(log, 137, "", HOSTS) == "fail"
    (stacks / "rank-1.txt").write_text("Thread 2")
    os.utime(stacks / "rank-1.txt", (time.time() + 1,) * 2)  # the clock of the file system may lag by milliseconds
    assert end(log, 137, "", HOSTS) == "retry"
    assert "the run hung" in capsys.readouterr().err


def test_three_starts_without_a_new_checkpoint_hold_the_job(log):
    for _ in range(
        2
    ):  # the fixture began the first of three; if a node dies, SLURM restarts the job without a recorded end
        assert begin(log, HOSTS) == "go"
    (log.folder / "latest").write_text("step-00000010\n")
    assert end(log, 76, "", HOSTS) == "retry"  # the third start made progress
    for _ in range(2):
        assert begin(log, HOSTS) == "go"
        assert end(log, 76, "", HOSTS) == "retry"
    other = JobLog(log.folder, "8", 0)
    assert begin(other, HOSTS) == "go"  # another job has its own count
    with open(log.folder / "jobs.jsonl", "a") as file:
        file.write('{"event": "beg\n')  # a power cut
    assert begin(log, HOSTS) == "go"
    assert end(log, 76, "", HOSTS) == "hold"
    assert begin(log, HOSTS) == "go"  # a released job has three starts again
    for _ in range(2):
        assert begin(log, HOSTS) == "go"
    assert begin(log, HOSTS) == "hold"


def test_a_full_disk_does_not_prevent_a_retry(log, capsys):
    status(log, "stopped")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((log.folder / "jobs.jsonl").stat().st_size, limits[1]))
        verdict = end(log, 75, "USR1", HOSTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert verdict == "retry"
    assert "warning: cannot write" in capsys.readouterr().err


def test_a_run_that_is_done_or_failed_is_not_held(log):
    for _ in range(2):
        begin(log, HOSTS)
    assert end(log, 1, "", HOSTS) == "fail"
    status(log, "done")
    assert end(log, 0, "", HOSTS) == "done"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["max_steps=3"],
        ["output=runs/a b; c", "max_steps=3"],
        ["output=runs/a", "--config", "CONFIG", "output=runs/b=c"],
        ["--config", "CONFIG"],
        ["seed=1", "--config", "EMPTY"],
        ["output='runs/in quotes'"],
    ],
)
def test_the_run_folder_is_the_one_that_training_uses(words, tmp_path):
    (tmp_path / "CONFIG").write_text("output: runs/named\nmax_steps: 3\n")
    (tmp_path / "EMPTY").write_text("max_steps: 3\n")
    words = [str(tmp_path / word) if word.isupper() else word for word in words]
    options = parse_arguments(["--deepspeed_config", "x.json", *words])
    expected = load_run_config(options.config, options.overrides).output
    assert run_folder(["--deepspeed_config", "x.json", *words]) == expected


def test_a_missing_configuration_is_an_error_of_one_sentence():
    with pytest.raises(ConfigurationError, match="cannot read the run configuration /nowhere.yaml: No such file"):
        run_folder(["--config", "/nowhere.yaml"])


def test_the_batch_script_gets_one_line(tmp_path):
    command = [sys.executable, "-m", "launcher.cluster.batch_job"]
    arguments = ["--deepspeed_config", "ds_configs/zero3.json", "max_steps=3", f"output={tmp_path}/a b"]
    variables = {**os.environ, "SLURM_JOB_ID": "5"}
    answers = [
        subprocess.run([*command, *rest], env=variables, capture_output=True, text=True, timeout=60, check=True).stdout
        for rest in (
            ["folder", *arguments],
            ["begins", f"{tmp_path}/a b", "node1"],
            ["ended", f"{tmp_path}/a b", "1", "", "node1"],
        )
    ]
    assert answers == [f"{tmp_path}/a b\n", "go\n", "fail\n"]

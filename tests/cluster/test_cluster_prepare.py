"""`sbatch slurm/prepare.sbatch` writes the same bytes as one process, however the work is shared."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def sources(project) -> list[str]:
    """Four files, so that there is work to share."""
    names = [f"rows-{part}.jsonl" for part in range(4)]
    for part, name in enumerate(names):
        rows = (
            {"question": f"What is {n} plus {part}?", "answer": f"{n} and {part} are {n + part}."} for n in range(2000)
        )
        (project / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return names


@pytest.fixture(scope="module")
def expected(project, sources) -> list[str]:
    command = [sys.executable, "-m", "launcher.cli", "prepare", *sources, "--tokenizer", "train", "--seq-len", "64"]
    subprocess.run([*command, "--out", "shards/local"], cwd=project, capture_output=True, timeout=120, check=True)
    return hashes(project, "local")


@pytest.mark.parametrize(
    ("name", "options", "environment"),
    [
        ("array", ["--array=0-3"], {}),
        ("tasks", ["--nodes=2", "--ntasks-per-node=2"], {}),
        ("mpi", ["--nodes=2", "--ntasks-per-node=2"], {"LFM_MPI": "pmix"}),
    ],
)
def test_a_job_writes_the_same_bytes_as_one_process(submit, project, sources, expected, name, options, environment):
    options = [*options, "--cpus-per-task=1"]
    arguments = [*sources, "--tokenizer", "train", "--seq-len", "64", "--out", f"shards/{name}"]
    job = submit("prepare", *arguments, options=options, **environment)
    job.finish()
    assert hashes(project, name) == expected
    logs = "".join(log.read_text() for log in project.glob("lfm-prepare-*.out"))
    assert logs.count(f"shards/{name}: 8,000 rows") == 1
    assert "Traceback" not in logs


def test_shell_syntax_in_a_folders_name_is_not_executed(submit, project):
    name = "shards/a b; touch stray $(touch stray) `touch stray`"
    job = submit("prepare", "sample", "--out", name, options=["--cpus-per-task=1", "--job-name=$(touch stray)"])
    job.finish()
    assert (project / name / "index.json").exists()
    refused = submit("evaluate", name, options=["--cpus-per-task=1"])
    assert refused.wait_until("FAILED", "COMPLETED") == "FAILED"
    assert f"lfm evaluate {name}" in refused.log and "error: " in refused.log
    assert not (project / "stray").exists()


def test_a_preparation_resumes_after_its_time_limit(submit, project, sources, expected):
    arguments = [*sources, "--tokenizer", "train", "--seq-len", "64", "--out", "shards/limited"]
    job = submit("prepare", *arguments, options=["--cpus-per-task=1"])
    job.wait_for("fitting the tokenizer")
    submit.slurm("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the limit
    job.wait_for("requeueing job")
    job.finish()
    assert hashes(project, "limited") == expected


def hashes(project, name: str) -> list[str]:
    index = json.loads((project / "shards" / name / "index.json").read_text())
    return [entry["sha256"] for entry in index["files"]]

"""`lfm submit` on the real cluster: the jobs of a chain run in order, and a sweep writes its table."""

import subprocess
import sys

import pytest

from tests.cluster.jobs import Job, read_status

pytestmark = pytest.mark.cluster
SMALL = ["--sbatch=--cpus-per-task=1", "--sbatch=--mem=1G"]


@pytest.fixture
def lfm_submit(submit):
    """Call `lfm submit` as a user would, and return the jobs in order."""

    def call(*words: str) -> list[Job]:
        command = [sys.executable, "-m", "launcher.cli", "submit", *SMALL, *words]
        result = subprocess.run(
            command, cwd=submit.project, env=submit.environment, capture_output=True, text=True, timeout=90, check=False
        )
        assert result.returncode == 0, result.stderr
        numbers = [line.split()[1].strip(":") for line in result.stdout.splitlines() if line.startswith("job ")]
        jobs = [Job(submit, number, "lfm") for number in numbers]
        submit.jobs += jobs
        return jobs

    return call


def test_a_chain_prepares_trains_and_evaluates(lfm_submit, project, configured):
    training = [*configured, "data=data/chain", "output=runs/chain", "max_steps=1"]
    chain = ["prepare", "sample", "--seq-len", "64", "--out", "data/chain", "then", "train", *training]
    questions = project / "questions.jsonl"
    questions.write_text('{"question": "What is 1 plus 1?", "answer": "2"}\n')
    evaluation = ["then", "evaluate", "runs/chain", "--questions", str(questions), "--max-new-tokens", "2"]
    jobs = lfm_submit("--nodes", "1", "--gpus", "1", "--chain", *chain, *evaluation)
    for job, name in zip(jobs, ("prepare", "train", "evaluate"), strict=True):
        assert job.wait_until("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", [
            log.read_text() for log in project.glob(f"lfm-{name}-{job.number}.out")
        ]
    assert read_status(project / "runs" / "chain")["state"] == "done"
    assert "held-out answers are exactly right" in (project / f"lfm-evaluate-{jobs[2].number}.out").read_text()


def test_a_failed_job_cancels_the_rest_of_its_chain(lfm_submit):
    jobs = lfm_submit("--chain", "prepare", "/nowhere", "--out", "data/none", "then", "train")
    assert jobs[0].wait_until("COMPLETED", "FAILED") == "FAILED"
    assert jobs[1].wait_until("COMPLETED", "FAILED", "CANCELLED") == "CANCELLED"


def test_a_sweep_trains_every_value_and_writes_a_table(lfm_submit, project, configured):
    training = [*configured, "output=runs/sweep", "max_steps=1"]
    jobs = lfm_submit("--nodes", "1", "--gpus", "1", "--sweep", "learning_rate=1e-3,1e-2", "train", *training)
    jobs[-1].finish()
    lines = (project / "runs" / "sweep" / "table.md").read_text().splitlines()
    assert lines[0].startswith("| learning_rate | state | step | train loss |")
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [["done", "1"], ["done", "1"]]

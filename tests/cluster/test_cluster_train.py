"""`sbatch slurm/train.sbatch` on two nodes: however a run is interrupted, its curves equal an undisturbed run's."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.cluster.jobs import STEPS, curves, processes_of, ranks_of, read_status

pytestmark = pytest.mark.cluster
RESUMING = r"resuming from runs/dark/checkpoints/step-(\d{8})"


def test_two_nodes_give_the_same_losses_as_one(submit, project, configured, undisturbed):
    """The experts are spread over both nodes, so every token crosses the network."""
    job = submit("train", *configured, "output=runs/two-nodes", LFM_INTERFACE="eth0")
    job.finish()
    assert "2 ranks on node[1-2], master node1:" in job.log
    assert set(undisturbed["train/loss"]) == set(range(1, STEPS + 1))
    assert curves(project / "runs" / "two-nodes") == undisturbed
    questions = project / "questions.jsonl"
    questions.write_text('{"question": "What is 1 plus 1?", "answer": "2"}\n{"question": "And 2?", "answer": "4"}\n')
    job = submit("evaluate", "runs/two-nodes", "--questions", str(questions), "--max-new-tokens", "2")
    job.finish()
    assert job.log.count("of 2 held-out answers are exactly right") == 1


def test_a_run_resumes_after_its_time_limit(submit, project, configured, undisturbed):
    job = submit("train", *configured, "output=runs/limited")
    job.wait_for("step 8/")
    ranks = ranks_of("runs/limited")
    for rank in ranks:  # SLURM checks time limits twice a minute, and the run would have finished by then
        os.kill(rank, signal.SIGSTOP)
    # The limit counts from the start: one to two minutes are left, and #SBATCH --signal requests a signal at 180 s.
    job.scontrol(f"TimeLimit={job.minutes() + 2}")
    job.wait_for("got USR1")
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    job.wait_for("requeueing job")
    assert read_status(project / "runs" / "limited")["state"] == "stopped"
    until(lambda: job.state() == "PENDING" or "restart 1:" in job.log)
    job.scontrol("TimeLimit=60")
    job.finish()
    assert "restart 1: 2 ranks" in job.log
    assert curves(project / "runs" / "limited") == undisturbed


def test_a_run_resumes_after_a_more_urgent_job(submit, project, configured, undisturbed):
    job = submit("train", *configured, "output=runs/preempted")
    job.wait_for("step 8/")
    ranks = ranks_of("runs/preempted")
    for rank in ranks:  # the scheduler runs every few seconds, and the run would have finished by then
        os.kill(rank, signal.SIGSTOP)
    submit.urgent()
    job.wait_for("asking the ranks to save")
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    job.wait_for("requeueing job")
    assert read_status(project / "runs" / "preempted")["state"] == "stopped"
    job.finish()
    assert "restart 1: 2 ranks" in job.log
    assert curves(project / "runs" / "preempted") == undisturbed


@pytest.fixture
def silent(cluster, submit):
    """Configure the cluster like a site that does not send a preempted job's signal to its batch script."""
    content = cluster.configuration.read_text()
    cluster.configuration.write_text(content.replace("SlurmctldParameters=preempt_send_user_signal", ""))
    submit.slurm("scontrol", "reconfigure")
    yield
    cluster.configuration.write_text(content)
    submit.slurm("scontrol", "reconfigure")


def test_a_preemption_that_only_the_ranks_were_told_of_is_no_failure(submit, project, configured, silent):
    """It arrives while the ranks start, and ends them: SLURM signals the processes that exist at that time."""
    job = submit("train", *configured, "output=runs/silent", "max_steps=1", "schedule.steps=24")
    until(lambda: len(ranks_of("runs/silent", "-m", "launcher.cli", "preflight")) == 2)
    submit.urgent()
    job.wait_for("has already asked the ranks to stop")
    job.wait_for("requeueing job")
    job.finish()
    assert "restart 1: 2 ranks" in job.log
    assert read_status(project / "runs" / "silent")["state"] == "done"


def test_a_run_resumes_after_power_cuts(submit, cluster, project, configured, undisturbed):
    """First the power of a worker node is cut, then that of the node that also runs the batch script."""
    job = submit("train", *configured, "output=runs/dark")
    saved, begun = 0, 0
    for node in ("node2", "node1"):
        saved += 6
        job.wait_for(f"checkpoint step-{saved:08} is saved", since=begun)
        cluster.power_off(node)
        job.wait_until("PENDING")
        begun = len(job.log)
        cluster.power_on(node)
        until(lambda begun=begun: re.search(RESUMING, job.log[begun:]))
        resumed = int(re.search(RESUMING, job.log[begun:])[1])
        assert resumed >= saved
        saved = resumed
    job.finish()
    assert "restart 2: 2 ranks" in job.log
    assert curves(project / "runs" / "dark") == undisturbed
    attempts = [json.loads(line) for line in (project / "runs" / "dark" / "jobs.jsonl").read_text().splitlines()]
    # If the script's own node stays on, the script may have time to record how its start ended.
    assert [line["restart"] for line in attempts if line["event"] == "begins"] == [0, 1, 2]
    assert (attempts[-1]["event"], attempts[-1]["verdict"]) == ("ended", "done")


def test_a_run_that_hangs_is_started_again(submit, project, configured, undisturbed):
    """Rank 1 stands still, so rank 0's watchdog ends the step; that srun then has to kill rank 1 must not matter."""
    job = submit("train", *configured, "output=runs/hung", "step_timeout_seconds=12")
    job.wait_for("step 8/")
    os.kill(ranks_of("runs/hung")[1], signal.SIGSTOP)
    job.wait_for("the run hung")
    job.finish()
    assert curves(project / "runs" / "hung") == undisturbed


def test_a_killed_rank_ends_its_job_at_once(submit, configured):
    job = submit("train", *configured, "output=runs/killed")
    job.wait_for("step 8/")
    os.kill(ranks_of("runs/killed")[1], signal.SIGKILL)
    until(lambda: not ranks_of("runs/killed"))
    assert job.wait_until("FAILED", "COMPLETED", "PENDING") != "COMPLETED"
    assert "task 0: Killed" in job.log  # by SLURM, before rank 0 would time out waiting for rank 1
    assert not processes_of(job)


def test_three_starts_without_a_checkpoint_hold_the_job(submit, project, configured):
    """The test writes the records of two starts itself, as two power cuts would leave them."""
    job = submit("train", *configured, "output=runs/fruitless", options=["--hold"])
    folder = project / "runs" / "fruitless"
    folder.mkdir(parents=True)
    start = {"event": "begins", "job": job.number, "restart": 0, "time": 0, "checkpoint": None}
    (folder / "jobs.jsonl").write_text(2 * (json.dumps(start) + "\n"))
    submit.slurm("scontrol", "release", job.number)
    job.wait_for("restart 0: 2 ranks")
    submit.slurm("scancel", "--batch", "--signal=USR1", job.number)  # before the ranks can save anything
    job.wait_for("error: 3 starts in a row got no further than the beginning")
    until(lambda: "held" in submit.slurm("squeue", "--noheader", f"--jobs={job.number}", "--format=%T %r"))
    submit.slurm("scontrol", "release", job.number)
    job.wait_for("restart 1: 2 ranks")  # releasing the job means that the user has fixed the cause


def test_a_suspected_host_is_not_used_again(submit, project):
    (project / "slurm" / "suspecting.sbatch").write_text(
        "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --requeue\n#SBATCH --open-mode=append\n"
        "#SBATCH --output=lfm-suspecting-%j.out\n#SBATCH --exclude=node2\n"
        "source slurm/lifecycle.sh\nhostname\n[[ -n ${SLURM_RESTART_COUNT:-} ]] || { suspects=(node1); requeue; }\n"
    )
    job = submit("suspecting")
    job.wait_for("the job will not use node1 again")
    excluded = submit.slurm("squeue", "--noheader", f"--jobs={job.number}", "--format=%x")
    assert excluded.strip() in ("node[1-2]", "node1,node2")  # in addition to the nodes that the user excludes


def test_a_task_of_an_array_requeues_only_itself(submit, project):
    """The task with the array's own job number gets the signal; the other one runs on undisturbed."""
    (project / "slurm" / "array.sbatch").write_text(
        "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --requeue\n#SBATCH --open-mode=append\n#SBATCH --mem=100M\n"
        "#SBATCH --output=lfm-array-%a.out\nsource slurm/lifecycle.sh\n"
        "echo job $SLURM_JOB_ID of $SLURM_ARRAY_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}\n"
        "[[ -n ${SLURM_RESTART_COUNT:-} ]] || run_step srun bash -c 'echo works; sleep 600'\n[[ -z $asked ]] || requeue\n"
    )
    job = submit("array", options=["--array=0-1"])
    logs = [project / f"lfm-array-{task}.out" for task in (0, 1)]
    until(lambda: all(log.exists() and "works" in log.read_text() for log in logs))
    (own,) = [task for task, log in enumerate(logs) if f"job {job.number} of {job.number}," in log.read_text()]
    submit.slurm("scancel", "--batch", "--signal=USR1", f"{job.number}_{own}")
    until(lambda: "restart 1" in logs[own].read_text())
    other = f"{job.number}_{1 - own}"
    assert submit.slurm("squeue", "--noheader", f"--jobs={other}", "--format=%T").split() == ["RUNNING"]
    assert logs[1 - own].read_text().count("restart") == 1


def until(happened, seconds: float = 180) -> None:
    """Wait until `happened()` is true; fail if that takes too long."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


HOSTILE = "a b; touch stray $(touch stray) `touch stray` 'touch stray' \"|touch stray"


def test_a_wrong_configuration_ends_a_job_before_any_step(submit, project, configured):
    """The error is one sentence, and shell syntax in the run's name is not executed."""
    output = f"runs/{HOSTILE}"
    job = submit("train", *configured, f"output={output}", "global_batch_rows=7", options=[f"--job-name={HOSTILE}"])
    assert job.wait_until("FAILED", "COMPLETED") == "FAILED"
    assert "global_batch_rows" in job.log and "error: the run would fail" in job.log
    assert "step 1/" not in job.log and "Traceback" not in job.log
    assert (project / output / "jobs.jsonl").exists()
    assert not (project / "stray").exists()


def test_a_shell_of_several_tasks_does_not_wait_for_the_others(submit):
    """The other tasks of `srun --ntasks=3 --pty bash` are shells without a terminal, which exit at once."""
    show = "import launcher.environment as e; print('rank {0.rank} of {0.world_size}'.format(e.detect_environment()))"
    ask = f'[[ -t 0 ]] || exit 0; {sys.executable} -c "$SHOW"; srun --overlap --ntasks=2 {sys.executable} -c "$SHOW"; exit'
    terminal, inside = pty.openpty()
    try:
        process = subprocess.Popen(
            ["srun", "--ntasks=3", "--pty", "bash", "-c", ask], stdin=inside, stdout=inside, stderr=inside,
            cwd=submit.project, env={**submit.environment, "SHOW": show}, start_new_session=True,
        )  # fmt: skip
        process.wait(timeout=60)
        said = os.read(terminal, 100_000).decode()
    finally:
        os.close(inside)
        os.close(terminal)
    assert "this shell was opened by `srun --pty` for 3 tasks but is only one of them" in said
    assert sorted(re.findall(r"rank \d of \d", said)) == ["rank 0 of 2", "rank 1 of 2"]

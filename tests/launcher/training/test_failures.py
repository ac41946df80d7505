"""Recognising errors of communication and devices, naming suspect hosts, and writing a status to a full disk."""

import errno
import json
import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist

from launcher.errors import ConfigurationError, HardwareError
from launcher.run_folder import RunFolder
from launcher.training.resilience.failures import Failures, recognised_failures, what_failed
from tests.launcher.disk import fill
from tests.launcher.trainer import start

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37769."


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(GLOO), "communication"),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), "communication"),
        (dist.DistNetworkError("The client socket has timed out after 600000ms"), "communication"),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"), None),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "device"),
        (RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"), "device"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), None),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), None),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError("No space left on device"), None),
    ],
)
def test_only_errors_that_another_machine_could_avoid_are_recognised(error, kind):
    assert what_failed(error) == kind


def test_a_recognised_error_outside_training_names_host_and_rank(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    said = f"rank 3 on {socket.gethostname()}: DistNetworkError: no route"
    with pytest.raises(HardwareError, match=said), recognised_failures():
        raise dist.DistNetworkError("no route to host")
    with pytest.raises(RuntimeError, match="shapes"), recognised_failures():
        raise RuntimeError("shapes")


def judged(notes: dict[int, tuple[str, str]], hosts: list[str], *others) -> tuple[str, list[str], bool]:
    failures = Failures.__new__(Failures)
    failures._hosts = hosts
    return failures._judge({rank: {"kind": kind, "sentence": said} for rank, (kind, said) in notes.items()}, *others)


def test_ranks_without_a_note_are_suspect_and_ranks_that_noticed_are_not():
    hosts = ["a", "a", "b", "c"]
    noticed = ("communication", "RuntimeError: closed")
    assert judged(dict.fromkeys((0, 1, 3), noticed), hosts)[1:] == (["b"], False)
    reason, suspects, _ = judged({0: noticed, 3: noticed}, hosts)
    assert suspects == ["a", "b"] and reason.startswith("rank 1 on a and rank 2 on b ended without a word")
    reason, suspects, _ = judged({0: noticed, 1: noticed, 2: noticed, 3: ("device", "ECC")}, hosts)
    assert suspects == ["c"] and "rank 3 on c has a device fault: ECC" in reason
    assert judged(dict.fromkeys(range(4), noticed), hosts)[1:] == ([], False)
    # If the disk is full, no rank can leave a note, so a missing note makes no host suspect.
    assert judged({0: noticed}, hosts, False)[1:] == ([], False)
    # A rank's own error would also happen on another machine.
    reason, suspects, own_error = judged({0: noticed, 2: ("error", "ValueError: 3"), 3: noticed}, hosts)
    assert (reason, suspects, own_error) == ("rank 2 on b failed: ValueError: 3", [], True)


FAIL = """
import os, sys, time
import torch, torch.distributed as dist
from launcher.errors import one_sentence_errors
from launcher.training.resilience.failures import Failures
from launcher.run_folder import RunFolder

rank, how = int(os.environ["RANK"]), sys.argv[2]
dist.init_process_group("gloo")
failures = Failures(RunFolder(sys.argv[1]))
with one_sentence_errors():
    try:
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), 9)
        if rank == 1 and how == "own":
            raise ValueError("of rank 1 alone")
        if rank == 1 and how == "device":
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        if rank == 2:  # waits only for rank 0, which is alive
            dist.recv(torch.zeros(1), src=0)
        if rank == 0:
            dist.recv(torch.zeros(1), src=1)
    except Exception as error:
        failures.end(7, error)
        raise
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes", "suspected", "said"),
    [
        ("killed", [77, -9, 77], True, "rank 1 on {host} ended without a word"),
        ("device", [77, 77, 77], True, "rank 1 on {host} has a device fault"),
        ("own", [1, 1, 1], False, "rank 1 on {host} failed: ValueError: of rank 1 alone"),
    ],
)
def test_the_surviving_ranks_agree_which_one_is_lost_and_the_status_names_its_host(
    tmp_path, how, codes, suspected, said
):
    results = start(3, [sys.executable, "-c", FAIL, str(tmp_path), how], patience=40)
    assert [result.returncode for result in results] == codes, [result.stdout for result in results]
    host = socket.gethostname()
    for rank in (0, 2):
        assert f"error: {said.format(host=host)}" in results[rank].stdout
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["host"]) == ("failed", 7, host)
    assert said.format(host=host) in status["reason"] and status["suspects"] == ([host] if suspected else [])


def test_a_run_whose_rank_0_was_killed_says_so_at_the_next_start(tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    run.claim()
    run.write_status("running", 40)
    run.release()
    again = RunFolder(tmp_path / "run")
    again.claim()
    assert "the previous attempt did not end properly: last seen at step 40" in capsys.readouterr().out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("starting", 40)
    again.write_status("done", 60)
    lines = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert [(line["state"], line["step"]) for line in lines] == [("failed", 40), ("done", 60)]
    assert "rank 0 was killed" in lines[0]["reason"]


def test_a_running_status_is_updated_after_a_while(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.claim()
    for seconds, told in ((60.0, 0), (0.0, 7)):
        monkeypatch.setattr("launcher.run_folder.STATUS_EVERY", seconds)
        run.note_step(7)
        assert json.loads((run.path / "status.json").read_text())["step"] == told
    RunFolder(tmp_path / "run").note_step(8)  # as on the other ranks, which do not hold the folder
    assert json.loads((run.path / "status.json").read_text())["step"] == 7


@pytest.mark.slow
def test_the_last_step_of_a_killed_run_is_known_from_its_status(trainer, capsys):
    arguments = trainer.arguments("killed", "max_steps=20")
    (result,) = trainer.run_with_faults(1, arguments, [{"kind": "kill", "steps": [4]}], status_every=0.0)
    assert result.returncode == -9, result.stdout
    run = RunFolder(trainer.folder / "killed")
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("running", 3)
    run.claim()
    assert "did not end properly: last seen at step 3" in capsys.readouterr().out


def test_a_file_system_without_locks_is_an_error_of_one_sentence(tmp_path, monkeypatch):
    def unsupported(*arguments) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unsupported)  # as on Lustre without -o flock
    with pytest.raises(ConfigurationError, match="cannot lock .*lock .Function not implemented.*-o flock.*set output"):
        RunFolder(tmp_path / "run").claim()


def test_a_status_overwrites_the_old_one_on_a_full_disk(small_disk, capsys):
    run = RunFolder(small_disk)
    run.write_status("running", 3)
    fill(small_disk)
    run.write_status("failed", 9, "the real error")
    status = json.loads((small_disk / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("failed", 9, "the real error")
    assert "attempts.jsonl could not be written (No space left on device)" in capsys.readouterr().err
    (small_disk / "status.json").unlink()
    fill(small_disk)
    run.write_status("failed", 9, "the real error")  # nothing to overwrite: printed instead, and no error
    assert "the real error" in capsys.readouterr().err

"""Several processes and jobs on one folder: the bytes of one, whatever dies or waits."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_pipeline.preparation.prepare
from data_pipeline.checking.verification import verify
from data_pipeline.errors import DataError
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.scratch import load_arrays
from data_pipeline.preparation.settings import Settings
from data_pipeline.preparation.team import Member

SETTINGS = {"seq_len": 64, "rows_per_shard": 20, "vocab_size": 400, "validation_share": 0.2}
SMALL = {
    "data_pipeline.sources.chunk.BYTES_PER_CHUNK": 4000,
    "data_pipeline.preparation.select_rows.ROWS_PER_GROUP": 60,
}
SCRIPT = """
import itertools, json, os, signal, sys
import data_pipeline.sources.jsonl, data_pipeline.preparation.select_rows
from data_pipeline.errors import DataError
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from data_pipeline.preparation.team import Member, Team

def run_and_die(team, *arguments):
    for unit in real_run(team, *arguments):
        yield unit
        if next(units) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

units, real_run = itertools.count(1), Team._run
if __name__ == "__main__":
    data_pipeline.sources.chunk.BYTES_PER_CHUNK, data_pipeline.preparation.select_rows.ROWS_PER_GROUP = 4000, 60
    source, out, settings, member, workers, kill_after = sys.argv[1:]
    kill_after, Team._run = int(kill_after), run_and_die
    try:
        prepare(
            source, out, Settings(**json.loads(settings)), member=Member(**json.loads(member)), workers=int(workers),
            progress=False,
        )
    except DataError as error:
        sys.exit(f"one sentence: {error}")
"""


def contents(folder):
    """Gives the sha256 of every file by its name, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".prepare.lock"
    }


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "prepare_it.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def start(script, corpus):
    """Starts a job on a folder, which kills itself once it has done `kill_after` units of work."""

    def start(out, workers=1, settings=SETTINGS, source=corpus, kill_after=0, **member):
        command = [sys.executable, script, source, out, json.dumps(settings), json.dumps(member), str(workers)]
        command.append(str(kill_after))
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    return start


@pytest.fixture(scope="module")
def expected(tmp_path_factory, corpus):
    """What one process in one go makes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        prepare(str(corpus), out, Settings(**SETTINGS), workers=1, progress=False)
    index = verify(out)
    assert len({entry["name"].split("-")[1] for entry in index["files"]}) > 3
    assert (out / "validation" / "index.json").exists()
    return contents(out)


def children_of(process):
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between opening and reading
        return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def chunks_in(out):
    return list((out / ".work").glob("chunk-*.npz"))


def test_three_processes_make_the_bytes_of_one(start, expected, tmp_path):
    process = start(tmp_path / "out", workers=3)
    assert process.communicate(timeout=100)[1] == ""
    assert contents(tmp_path / "out") == expected


def test_jobs_share_the_work_and_make_the_bytes_of_one(start, expected, tmp_path):
    jobs = [start(tmp_path / "out", index=index, count=3) for index in range(3)]
    assert [job.communicate(timeout=100)[1] for job in jobs] == ["", "", ""]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert contents(tmp_path / "out") == expected


def test_one_job_of_an_array_does_the_work_of_those_that_never_come(start, expected, tmp_path):
    job = start(tmp_path / "out", index=1, count=3)
    assert job.communicate(timeout=100)[1] == ""
    assert contents(tmp_path / "out") == expected
    late = start(tmp_path / "out", index=0, count=3)
    assert late.communicate(timeout=60)[1] == ""
    assert contents(tmp_path / "out") == expected


def test_what_a_killed_job_had_claimed_is_done_once_the_claim_is_old(start, expected, tmp_path):
    out = tmp_path / "out"
    assert start(out, workers=2, index=0, count=2, kill_after=3).wait(timeout=60) == -9
    claims = {path.name for path in (out / ".work" / "claims").iterdir()}
    assert claims - {path.name for path in chunks_in(out)}
    job = start(out, index=1, count=2, patience=1.0)
    assert job.communicate(timeout=100)[1] == ""
    assert contents(out) == expected


def test_a_job_that_fails_leaves_its_units_to_the_others(corpus, start, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + "{\n")
    out = tmp_path / "out"
    jobs = [start(out, index=index, count=2, source=bad) for index in range(2)]
    for job in jobs:
        assert "one sentence: " + str(bad) + ", line 421: it is not valid JSON" in job.communicate(timeout=60)[1]
    done = {path.name for path in chunks_in(out)}
    assert {path.name for path in (out / ".work" / "claims").iterdir()} <= {*done, "tokenizer.json"}


def test_killed_again_and_again_the_bytes_are_the_same_and_no_process_stays(start, expected, tmp_path):
    out = tmp_path / "out"
    # after the tokenizer, some chunks, the selection, some shards
    for kill_after in (1, 4, 14, 2):
        process = start(out, workers=2, kill_after=kill_after)
        workers = set()
        while process.poll() is None:
            workers |= set(children_of(process))
            time.sleep(0.01)
        assert process.returncode == -9
        assert not (out / "index.json").exists()
        assert workers
        wait_for(lambda: not any(map(is_alive, workers)), seconds=10)  # noqa: B023
    assert start(out, workers=2).communicate(timeout=60)[1] == ""
    assert contents(out) == expected


def test_what_is_done_is_not_done_again(start, corpus, expected, tmp_path, monkeypatch):
    out, done_now = tmp_path / "out", []
    assert start(out, kill_after=5).wait(timeout=60) == -9
    kept = {int(path.name[6:12]) for path in chunks_in(out)}

    def encode_chunk(job, number):
        done_now.append(number)
        return real(job, number)

    real = data_pipeline.preparation.prepare.encode_chunk
    monkeypatch.setattr("data_pipeline.preparation.prepare.encode_chunk", encode_chunk)
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    prepare(str(corpus), out, Settings(**SETTINGS), workers=1, progress=False)
    assert done_now
    assert not kept & set(done_now)
    assert contents(out) == expected


def test_a_killed_worker_is_one_sentence_and_its_work_is_done_by_the_next_run(start, expected, tmp_path):
    out = tmp_path / "out"
    process = start(out, workers=2)
    wait_for(lambda: len(children_of(process)) >= 3)  # its two workers, and what tracks their shared resources
    os.kill(children_of(process)[-1], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert "one sentence: a process of this job was killed" in errors
    assert process.returncode == 1
    assert start(out, workers=2).wait(timeout=100) == 0
    assert contents(out) == expected


def test_other_settings_do_not_go_on_with_unfinished_work(start, tmp_path):
    out = tmp_path / "out"
    assert start(out, kill_after=3).wait(timeout=60) == -9
    errors = start(out, settings=SETTINGS | {"seq_len": 32}).communicate(timeout=60)[1]
    assert "is unfinished and was begun with seq_len = 64, but seq_len is now 32" in errors
    assert chunks_in(out)


def test_a_damaged_file_of_unfinished_work_is_found_and_made_anew(start, expected, tmp_path):
    out = tmp_path / "out"
    assert start(out, kill_after=6).wait(timeout=60) == -9
    damaged = chunks_in(out)[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    errors = start(out).communicate(timeout=60)[1]
    assert f"one sentence: {damaged.resolve()} was damaged and is removed: run again" in errors
    assert not damaged.exists()
    assert start(out).wait(timeout=60) == 0
    assert contents(out) == expected


def test_a_truncated_file_of_unfinished_work_is_damage_too(tmp_path):
    path = tmp_path / "chunk.npz"
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="was damaged and is removed"):
        load_arrays(path, "fate")


def test_a_member_is_one_of_its_team():
    assert Member().count == 1
    with pytest.raises(ValueError, match="member 3 of 3"):
        Member(3, 3)

import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import BatchStream
from data_pipeline.loading.prefetch import Prefetcher
from data_pipeline.loading.reader import ShardFolder
from tests.data_pipeline.shard_folders import flip_bit, make_folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


def stream(folder, **options):
    return BatchStream(
        ShardFolder(folder, **options), seed=1, global_batch_rows=8, micro_batch_rows=8, rank=0, world_size=1
    )


class CountingStream(BatchStream):
    """Says which positions were asked for, and takes its time, most of it for the first."""

    def step_at(self, position):
        time.sleep(0.3 if position == 0 else 0.02)
        self.__dict__.setdefault("asked", []).append(position)
        return super().step_at(position)


def counting(folder):
    return CountingStream(ShardFolder(folder), seed=1, global_batch_rows=8, micro_batch_rows=8, rank=0, world_size=1)


def wait_for_steps(slow, number):
    """Returns once so many were asked for, and a while after in which one more would have been."""
    deadline = time.monotonic() + 10
    while len(slow.__dict__.get("asked", [])) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)


def test_no_more_is_made_ahead_than_was_asked_for_and_the_position_is_what_was_handed_out(folder):
    slow = counting(folder)
    with Prefetcher(slow, steps=3) as batches:
        wait_for_steps(slow, 3)
        assert slow.asked == [0, 8, 16]
        assert batches.position == 0
        batches.next_step()
        wait_for_steps(slow, 4)
        assert slow.asked == [0, 8, 16, 24]
        assert batches.position == 8


def test_a_caller_that_is_slower_than_the_data_does_not_wait(folder):
    with Prefetcher(counting(folder), steps=2) as batches:
        batches.next_step()
        assert batches.seconds_waited > 0.01  # the first has to be made
        waits = []
        for _ in range(5):
            time.sleep(0.1)  # the step of training
            batches.next_step()
            waits.append(batches.seconds_waited)
        assert statistics.median(waits) < 0.01  # a busy machine may hold up one of them


def test_what_goes_wrong_in_the_background_is_raised_in_the_caller_and_can_be_tried_again(folder):
    shard = folder / "shard-00002.tar"
    whole = shard.read_bytes()
    flip_bit(shard)
    with Prefetcher(stream(folder), steps=3, threads=2) as batches:
        with pytest.raises(DataError, match="shard-00002.tar has changed since it was written"):
            [batches.next_step() for _ in range(67)]
        done = batches.position // 8
        assert done < 9
        assert batches.position == 8 * done
        shard.write_bytes(whole)
        (batch,) = batches.next_step()
        again = stream(folder)
        for _ in range(done + 1):
            (reference,) = again.next_step()
        assert batch["input_ids"].equal(reference["input_ids"])
        assert batches.position == 8 * (done + 1)


def test_closing_stops_the_threads(folder):
    before = threading.active_count()
    with Prefetcher(counting(folder), steps=8, threads=3):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert threading.active_count() <= before + 1  # the one that checks the shards ahead


def test_a_process_ends_although_steps_are_being_made_ahead(folder):
    program = f"""
from test_prefetch import counting, Prefetcher
from pathlib import Path
batches = Prefetcher(counting(Path({str(folder)!r})), steps=4, threads=2)
batches.next_step()
raise SystemExit(3)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, timeout=60, capture_output=True, text=True,
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}"},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (3, "")

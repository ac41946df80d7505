"""Ranks that have finished exit with their own code, whatever happens to other ranks or to the interpreter."""

import sys

from tests.launcher.trainer import start

# Rank 1 comes late to the last barrier, or after rank 0 has gone, or is killed before it.
LEAVE = """
import atexit, os, signal, sys, time
import torch, torch.distributed as dist
from launcher.training.resilience.leaving import end_process, leave_together

rank, how = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo")
dist.barrier()
atexit.register(os.abort)  # as native threads do that outlive the interpreter
if rank == 0 and how == "gone":
    dist.destroy_process_group()
    end_process(0)
if rank == 1:
    time.sleep(1)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
print("has done its work")
leave_together()
end_process(3 if how == "slow" else 0)
"""


def leave(how: str) -> tuple[list[int], list[str]]:
    results = start(2, [sys.executable, "-c", LEAVE, how], patience=60)
    return [result.returncode for result in results], [result.stdout for result in results]


def test_a_rank_waits_for_slow_ones_and_ends_with_its_own_code():
    codes, printed = leave("slow")
    assert codes == [3, 3], printed
    assert printed == ["has done its work\n"] * 2


def test_a_finished_rank_succeeds_even_if_another_one_is_gone_or_killed():
    codes, printed = leave("gone")
    assert codes == [0, 0], printed
    assert "rank 1 is done and leaves without waiting for the others" in printed[1]
    codes, printed = leave("killed")
    assert codes == [0, -9], printed
    assert "rank 0 is done and leaves without waiting for the others" in printed[0]

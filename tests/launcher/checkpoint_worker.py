"""One rank of a test: train runs one after another with faults at chosen saves, each on its rank.

Arguments (JSON): the runs, and the faults as a list of {run, step, rank, kind}, where kind is a name in FAULTS.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import train
from launcher.errors import one_sentence_errors
from launcher.training.checkpoints.saver import CheckpointSaver, FileWriter
from launcher.training.resilience.leaving import end_process, leave_together

LEFT_FREE = 30_000  # bytes: enough for some of a checkpoint's files


@contextmanager
def full_disk(saver: CheckpointSaver) -> Iterator[None]:
    """Fill the disk, which must be the test's own small one, and free it once the save has failed."""
    ballast = saver._run.checkpoints / "ballast"
    disk = os.statvfs(saver._run.checkpoints)
    ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - LEFT_FREE))
    settle = saver.settle

    def settle_then_free(last: bool = False) -> None:
        settle(last)
        if ballast.exists() and saver._pending is None and saver._failure:
            ballast.unlink()

    saver.settle = settle_then_free
    yield


@contextmanager
def file_size_limit(saver: CheckpointSaver) -> Iterator[None]:
    """Limit files of this process to 50,000 bytes; longer writes fail with EFBIG."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def kill_inside_a_file(saver: CheckpointSaver) -> Iterator[None]:
    def write_half(self: FileWriter, state_dict: dict, path: str) -> None:
        Path(path).write_bytes(b"the beginning of a file")
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(FileWriter, "save", write_half):
        yield


def kill_before(name: str):
    """Kill this process when the save, or the publishing after it, calls the function `name`."""

    @contextmanager
    def fault(saver: CheckpointSaver) -> Iterator[None]:
        patch(f"launcher.training.checkpoints.saver.{name}", lambda *_: os.kill(os.getpid(), signal.SIGKILL)).start()
        yield

    return fault


FAULTS = {
    "full disk": full_disk,
    "file size limit": file_size_limit,
    "kill inside a file": kill_inside_a_file,
    "kill before the manifest": kill_before("write_manifest"),
    "kill before the rename": kill_before("os.rename"),
    "kill before latest": kill_before("replace_text"),
    "kill before old ones are deleted": kill_before("delete_old"),
}


def main() -> None:
    runs, faults = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    save = CheckpointSaver.save
    for number, arguments in enumerate(runs):
        due = {
            fault["step"]: FAULTS[fault["kind"]]
            for fault in faults
            if fault["run"] == number and fault["rank"] == int(os.environ["RANK"])
        }

        def save_with_fault(saver, state, due=due):
            if state.step not in due:
                return save(saver, state)
            with due[state.step](saver):
                return save(saver, state)

        CheckpointSaver.save = save_with_fault
        train.main(arguments)
    leave_together()


if __name__ == "__main__":
    with one_sentence_errors():
        main()
    end_process(0)

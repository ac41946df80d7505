"""Find out why a run failed: by an error of its own, or because a rank or a machine was lost.

The rank that notices a lost peer is not the one at fault. Every rank that is still alive leaves a note in `failures/`;
a rank without a note was killed, or its machine is gone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from launcher.errors import HardwareError, OneSentenceError, TrainingError
from launcher.files import replace_text
from launcher.run_folder import RunFolder

GRACE = 10.0  # seconds to wait for the other ranks' notes; a rank without one by then is a suspect
COMMUNICATION = re.compile(
    r"gloo/(transport|rendezvous)/|ncclRemoteError|ncclSystemError|NCCL communicator was aborted"
)
# For example two ranks on one GPU; moving to another machine would not help.
MISUSE = re.compile(r"ncclInvalid(Usage|Argument)")
DEVICE = re.compile(
    r"uncorrectable (ECC|NVLink) error|hardware error|hardware stack error|GPU is lost|devices? is/are busy or unavailable"
    r"|CUDA-capable device\(s\) is/are busy|Xid|uncorrectable error"
)


def what_failed(error: BaseException | None) -> str | None:
    """Return `communication` or `device` if that caused the error; None for every other error.

    Illegal addresses, kernel assertions and lack of memory are mistakes in the program or the configuration, so they
    give None.
    """
    text = str(error)
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in text):
        return "device" if DEVICE.search(text) else None
    if isinstance(error, dist.DistError):  # from the backend (NCCL), the network or the rendezvous store
        return None if MISUSE.search(text) else "device" if DEVICE.search(text) else "communication"
    return "communication" if isinstance(error, RuntimeError) and COMMUNICATION.search(text) else None


@contextmanager
def recognised_failures() -> Iterator[None]:
    """Turn an error of communication or of a device into a `HardwareError`; let every other error pass."""
    try:
        yield
    except RuntimeError as error:
        kind = what_failed(error)
        if kind is None:
            raise
        rank, host = os.environ.get("RANK", "0"), socket.gethostname()
        raise HardwareError(
            f"rank {rank} on {host}: {_first_line(error)} ({kind}); start the run again to resume from its newest checkpoint"
        ) from error


class Failures:
    """Find out from all ranks' notes why this run ends, and record it; all ranks create it together.

    run: its `failures/` folder holds one note per rank, `{rank, host, kind, sentence}`.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._folder = run.path / "failures"
        self._rank = dist.get_rank()
        self._ended = False
        self._hosts = [""] * dist.get_world_size()
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)  # notes of the previous attempt
        dist.all_gather_object(self._hosts, socket.gethostname())

    def end(self, step: int, error: BaseException) -> None:
        """Write `status.json` for a run that ends with an error; later calls do nothing, as the first error is the reason.

        Raises `HardwareError` if a rank or a machine is lost, and `TrainingError` if another rank's own error ended this
        one. Returns if `error` itself is the reason, for the caller to raise.
        """
        if self._ended:
            return
        self._ended = True
        kind = what_failed(error)
        note = {
            "rank": self._rank,
            "host": self._hosts[self._rank],
            "kind": kind or "error",
            "sentence": _first_line(error),
        }
        is_left = self._leave(note)
        if kind is None:
            if self._rank == 0:
                self._run.write_status("failed", step, _first_line(error))
            return
        _leave_the_others()
        notes = self._notes_of_all(note)
        reason, suspects, own_error = self._judge(notes, is_left)
        if self._rank == min(notes):
            self._run.write_status("failed", step, reason, suspects)
        raise (TrainingError if own_error else HardwareError)(reason) from error

    def _judge(self, notes: dict[int, dict], notes_can_be_left: bool = True) -> tuple[str, list[str], bool]:
        """Return the reason in one sentence, the hosts to avoid, and whether the reason is some rank's own error."""
        by_kind = {
            kind: [rank for rank in sorted(notes) if notes[rank]["kind"] == kind] for kind in ("error", "device")
        }
        silent = sorted(set(range(len(self._hosts))) - notes.keys())
        go_on = "start the run again to resume from its newest checkpoint"
        if by_kind["error"]:
            rank = by_kind["error"][0]
            return f"rank {rank} on {self._hosts[rank]} failed: {notes[rank]['sentence']}", [], True
        if by_kind["device"]:
            rank = by_kind["device"][0]
            reason = f"rank {rank} on {self._hosts[rank]} has a device fault: {notes[rank]['sentence']}; {go_on}"
            return reason, self._hosts_of(by_kind["device"]), False
        if silent and notes_can_be_left:
            lost = " and ".join(f"rank {rank} on {self._hosts[rank]}" for rank in silent[:4])
            more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
            how = "ended without a word: killed (often for lack of memory), or the machine is gone"
            return f"{lost}{more} {how}; {go_on}", self._hosts_of(silent), False
        who = "and it is unknown which of them are alive" if silent else "though all of them are alive"
        told = notes[min(notes)]["sentence"]
        return f"the ranks lost their connection to one another, {who} ({told}); {go_on}", [], False

    def _hosts_of(self, ranks: list[int]) -> list[str]:
        return sorted({self._hosts[rank] for rank in ranks})

    def _leave(self, note: dict) -> bool:
        """Write this rank's note and return whether that succeeded."""
        try:
            self._folder.mkdir(exist_ok=True)
            replace_text(self._folder / f"rank-{self._rank}.json", json.dumps(note))
        except OSError as reason:
            print(f"rank {self._rank} cannot write its note to {self._folder}: {reason}", file=sys.stderr, flush=True)
            return False
        return True

    def _notes_of_all(self, own: dict) -> dict[int, dict]:
        deadline = time.monotonic() + GRACE
        while True:
            found = map(_read_note, self._folder.glob("rank-*.json"))
            notes = {own["rank"]: own} | {note["rank"]: note for note in found}
            if len(notes) == len(self._hosts) or time.monotonic() > deadline:
                return notes
            time.sleep(0.5)
            self._leave(own)  # NFS lists a folder up to half a minute late unless this host writes to it


def _leave_the_others() -> None:
    """Close this rank's connections: the others may wait for it in a collective that it will never join."""
    if dist.get_backend() == "nccl":
        return dist.distributed_c10d._abort_process_group()
    for descriptor in os.listdir("/proc/self/fd"):  # gloo has no abort that reaches the peers
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor))) as connection:
            connection.getpeername()  # raises for a listening socket: shutting that down would crash gloo's thread
            connection.shutdown(socket.SHUT_RDWR)


def _read_note(path: Path) -> dict:
    return json.loads(path.read_text())


def _first_line(error: BaseException) -> str:
    if isinstance(error, OneSentenceError | DataError):
        return str(error)  # already one sentence
    return f"{type(error).__name__}: {error}".splitlines()[0]

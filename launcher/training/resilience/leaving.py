"""End a process whose work is done; nothing that happens from here on may turn success into failure."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist

from launcher.training.resilience.failures import what_failed


def leave_together() -> None:
    """Wait until every rank is here, then leave the process group; a rank that is already gone is not an error.

    Launchers kill the other ranks when one exits with a code other than 0. Waiting lets every rank write its messages
    first. Errors that are not about communication are raised.
    """
    try:
        dist.barrier()
    except RuntimeError as error:
        # Fast ranks leave as soon as all have arrived, so a slow one may find their connections closed before it reads
        # their last message. If a rank was killed instead, its launcher sees that by its exit code.
        if what_failed(error) != "communication":
            raise
        said = str(error).partition("\n")[0]
        print(
            f"rank {os.environ.get('RANK', '0')} is done and leaves without waiting for the others ({said})",
            file=sys.stderr,
        )
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Flush all output and end this process with `code`, without the interpreter's shutdown.

    Engines keep process groups alive, whose threads (gloo's, NCCL's watchdog) still run native code while the
    interpreter shuts down. A crash there would give a complete run the exit code of a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

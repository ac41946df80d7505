"""The end of a process whose work is done: nothing that happens from here on may make a failure of it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist

from launcher.training.resilience.failures import what_failed


def leave_together() -> None:
    """Wait until every rank has come here, and leave the process group; a rank that is gone already is no error.

    Launchers end the others when the first rank leaves with a code other than 0, so that all first tell what they have
    to tell. Raises what is not about communication.
    """
    try:
        dist.barrier()
    except RuntimeError as error:
        # Ranks go when all have come, and a slow one may find the fast ones' connections closed before it sees their
        # last message. One that was killed instead has an exit code of its own, which its launcher sees.
        if what_failed(error) != "communication":
            raise
        said = str(error).partition("\n")[0]
        print(f"rank {os.environ.get('RANK', '0')} is done, and leaves without the others ({said})", file=sys.stderr)
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process with `code`, all output written, without the interpreter's own end.

    Engines keep process groups alive whose threads (gloo's, NCCL's watchdog) are in native code while the interpreter
    takes itself apart; what goes wrong there would give a run that is complete the exit code of a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Exit codes of this project's processes; `slurm/train.sbatch` decides by them what to do with the job.

A test holds the table in `launcher/training/README.md` and the batch scripts to this file.
"""

import signal

DONE = 0
FAILED = 1
WRONG_INPUT = 2
STOPPED = 75
HUNG = 76
LOST = 77
INTERRUPTED = 128 + signal.SIGINT
MEANINGS = {
    DONE: "done",
    FAILED: "failed",
    WRONG_INPUT: "the configuration, the data or an argument is wrong, or the result could not be written",
    STOPPED: "stopped at a signal, with a checkpoint; the same command resumes",
    HUNG: "a step hung",
    LOST: "a rank, a device or the connection between machines was lost",
    INTERRUPTED: "a second Ctrl-C",
}

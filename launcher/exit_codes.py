"""Exit codes of this project's processes; `slurm/train.sbatch` decides by them what to do with the job."""

import signal

DONE = 0
FAILED = 1
WRONG_INPUT = 2  # the configuration, the data or an argument
STOPPED = 75  # by a signal, with a checkpoint; the same command resumes
HUNG = 76  # a step took too long
LOST = 77  # a rank, a device or the connection between machines
INTERRUPTED = 128 + signal.SIGINT  # Ctrl-C

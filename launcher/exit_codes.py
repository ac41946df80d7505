"""How a process of this project ends; `slurm/train.sbatch` decides by these numbers what becomes of the job."""

import signal

DONE = 0
FAILED = 1
WRONG_INPUT = 2  # the configuration, the data or an argument
STOPPED = 75  # at a signal, with a checkpoint; the same command resumes
HUNG = 76  # a step took too long
LOST = 77  # a rank, a device or the connection between machines
INTERRUPTED = 128 + signal.SIGINT  # Ctrl-C

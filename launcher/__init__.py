"""Everything around the process: configuration, the DeepSpeed engine, checkpoints, monitoring and the `lfm` command."""

import os

# GNU OpenMP's threads spin at the end of each parallel loop. If another process has one of their cores, a step of a small
# model then takes ten times as long and more. It is read when torch is loaded, so whoever imports torch imports this first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

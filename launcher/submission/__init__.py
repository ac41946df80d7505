"""Jobs on a SLURM cluster: what the batch scripts ask."""

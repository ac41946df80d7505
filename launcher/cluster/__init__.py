"""Jobs on a SLURM cluster: calls of sbatch, and what the batch scripts ask."""

"""SLURM jobs: submission with sbatch, and the decisions of the batch scripts."""

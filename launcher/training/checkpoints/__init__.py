"""Write, verify, keep, find and load checkpoints, for any number of ranks."""

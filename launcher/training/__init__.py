"""Training: the plan of a run, its engine, checkpoints, monitoring and failure handling."""

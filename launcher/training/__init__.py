"""Training: from a plan to an engine, its checkpoints, its figures, and what keeps it alive."""

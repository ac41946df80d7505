"""Tools for trained models: evaluation, generation, serving, export and the run report."""

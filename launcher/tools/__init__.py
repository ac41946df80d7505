"""What comes after training: evaluation, generation, serving, export, the report."""

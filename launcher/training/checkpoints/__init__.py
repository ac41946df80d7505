"""Checkpoints: written beside and published, verified, kept, found again, for any number of ranks."""

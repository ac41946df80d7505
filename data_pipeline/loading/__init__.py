"""Shard folders to batches."""

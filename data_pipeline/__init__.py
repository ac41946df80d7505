"""Turns text into shards and shards into batches, independently of the model."""

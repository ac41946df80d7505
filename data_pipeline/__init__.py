"""Text to shards to batches; knows nothing of the model."""

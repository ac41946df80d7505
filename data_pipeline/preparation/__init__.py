"""The job that creates a shard folder."""

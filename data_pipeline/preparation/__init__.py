"""The job that makes a shard folder."""

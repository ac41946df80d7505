"""The format of shard folders, and how they are written."""

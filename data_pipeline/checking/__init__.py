"""Shard folders proved and looked at."""

"""Verification and inspection of shard folders."""

"""The format of shard folders and the code that writes them."""

"""Reading shard folders, and making batches from them."""

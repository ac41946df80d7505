"""Train a model with DeepSpeed and use it: configuration, checkpoints, monitoring and the `lfm` command."""

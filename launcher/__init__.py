"""Everything around the process: configuration, the DeepSpeed engine, checkpoints, monitoring and the `lfm` command."""

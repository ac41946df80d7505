"""What a run shows while it trains: TensorBoard figures, console lines, validation and profiles."""

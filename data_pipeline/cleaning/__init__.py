"""What is done to texts."""

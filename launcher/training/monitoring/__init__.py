"""What can be seen of a run: TensorBoard, console, validation, profiles, the report."""

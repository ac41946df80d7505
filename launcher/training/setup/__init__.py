"""A run's settings, data and model, made from its YAML file, the DeepSpeed JSON and the model's preset."""

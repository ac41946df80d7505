"""What a run is made of, from its YAML, the DeepSpeed JSON, the data and the model's preset."""

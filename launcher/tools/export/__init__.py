"""A run as a Hugging Face folder."""

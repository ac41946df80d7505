"""Augmentation: copies of rows in other words."""

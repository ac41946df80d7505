"""Readers of question/answer rows, and the built-in sample."""

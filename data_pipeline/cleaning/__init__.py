"""Text cleaning."""

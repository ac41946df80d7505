"""Checks that find errors before training starts: one file for each kind of check, and the table of results."""

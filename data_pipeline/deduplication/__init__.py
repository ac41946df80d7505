"""Detection of rows that repeat other rows or contain evaluation texts."""

"""What can be known wrong before a GPU hour is spent: one file for each kind of check, and the table of them."""

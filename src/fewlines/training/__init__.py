"""One training loop, and what is trained with it: one file per network."""

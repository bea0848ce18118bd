"""One file per instrument: quality, likelihood, cost."""

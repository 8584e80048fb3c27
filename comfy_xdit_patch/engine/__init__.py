"""One rank's share of the computation."""

"""Life and death of worker processes."""

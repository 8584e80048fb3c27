"""Life and death of the ranks; one request to them at a time."""

"""What the ranks hold, and where it lies."""

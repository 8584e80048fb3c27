"""The weights that a rank holds."""

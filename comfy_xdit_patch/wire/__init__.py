"""What crosses between the host and the ranks, and how."""

"""Every message between the host and the ranks."""

"""A VAE's decoder on all ranks."""

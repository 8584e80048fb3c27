"""Decoding of latents by all ranks."""

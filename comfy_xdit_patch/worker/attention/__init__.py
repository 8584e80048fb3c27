"""Attention of a sharded sequence."""

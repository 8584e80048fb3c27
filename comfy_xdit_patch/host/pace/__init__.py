"""Measured: which way a call goes, and which shares the ranks get."""

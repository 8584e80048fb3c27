"""Asks torch and the system which devices there are."""

"""Touching ComfyUI: reversible, checked, listed."""

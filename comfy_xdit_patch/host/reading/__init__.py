"""Reads ComfyUI's objects, changes nothing."""

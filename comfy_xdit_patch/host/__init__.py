"""What runs in ComfyUI's process."""

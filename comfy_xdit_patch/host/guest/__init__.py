"""What is wrapped of ComfyUI, and the way out."""

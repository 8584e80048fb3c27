"""A stand-in of comfy-aimdo, dynamic VRAM, for emulated cards: its names, with CPU addresses."""

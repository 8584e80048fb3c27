"""One FLUX image, made faster by several GPUs, from an unmodified ComfyUI graph.

Runs in: every process; imports nothing, because ``bootstrap`` is imported at interpreter start.
"""

__version__ = "0.1.0"

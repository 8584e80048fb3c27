"""Node packs that choose another attention function through ComfyUI's extension point.

Runs in: ComfyUI, as a pack of ``custom_nodes``.
"""

from .nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]

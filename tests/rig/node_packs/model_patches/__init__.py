"""Node packs that hang closures on ComfyUI's patches and wrappers.

Runs in: ComfyUI, as a pack of ``custom_nodes``.
"""

from .nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]

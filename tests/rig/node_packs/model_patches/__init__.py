"""Node packs that hang closures on ComfyUI's patches and wrappers."""

from .nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]

"""Node packs that give FLUX a forward of their own, each by another way in.

Runs in: a ComfyUI process of a test server.

Written for the tests; only the mechanism is that of the packs named at each node.
"""

from .nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]

"""A stand-in for the ComfyUI-GGUF node pack: the same mechanism, in as little code as it takes.

Runs in: a ComfyUI process of a test server, as a custom node.

Other code has to cope with what it shares with the real pack: weights are a tensor subclass with
``tensor_type``, ``tensor_shape`` and ``patches``, whose storage is bytes; layers of an operations
class of its own turn them into numbers at each call; a ModelPatcher subclass leaves weight patches
on the weight instead of changing it; the layers' state dict is a fake one.
"""

from .nodes import NODE_CLASS_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS"]

"""A node pack that replaces FLUX's attention function for everybody, when it is imported.

Runs in: a ComfyUI process of a test server.

FluxRegionAttention does so. It changes every graph, so it gets servers of its own.
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math

ORIGINAL = comfy.ldm.flux.layers.attention


def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    """Attend a little less to the first half of the tokens."""
    k = k.clone()
    k[:, :, : k.shape[2] // 2] *= 0.8
    return ORIGINAL(q, k, v, *args, **kwargs)


comfy.ldm.flux.layers.attention = attention
comfy.ldm.flux.math.attention = attention

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

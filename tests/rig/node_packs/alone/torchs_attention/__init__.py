"""A node pack that replaces torch's attention for the whole process, when it is imported.

Runs in: a ComfyUI process of a test server.

Packs with attention kernels of their own do so. It changes every graph, so it gets servers of its
own.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

ORIGINAL = F.scaled_dot_product_attention


def attention(q: Any, *args: Any, **kwargs: Any) -> Any:
    """Attend a little more evenly."""
    return ORIGINAL(q * 0.9, *args, **kwargs)


F.scaled_dot_product_attention = attention

NODE_CLASS_MAPPINGS: dict[str, Any] = {}

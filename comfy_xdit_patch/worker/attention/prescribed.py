"""Attention that a checkpoint prescribes for a block, underneath ours.

Runs in: worker process.

From 0.39 on ComfyUI's attention functions take ``preferred_attention``, a module of the block's
whose ``function`` runs in place of the function that ComfyUI chose. Where an
``optimized_attention_override`` is set, ComfyUI does not pass that module on; and in a shared call
our override is always set. So this file gives the module to our override. A node's own override
goes before it, as in ComfyUI.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from comfy_xdit_patch.wire.own_attribute import own_attribute

ARGUMENT = "preferred_attention"
OVERRIDE = "optimized_attention_override"


class SharedAttention(Protocol):
    """Our override of attention."""

    def prescribed(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return the override with this function underneath."""


@functools.lru_cache(maxsize=4)
def _takes_argument(function: Callable[..., Any]) -> bool:
    return ARGUMENT in inspect.signature(function).parameters


@contextmanager
def attention_of_blocks() -> Iterator[None]:
    """Run the attention that each block prescribes under our override, while this lasts."""
    import comfy.ldm.flux.math as module

    if not _takes_argument(module.attention):
        yield  # before 0.39
        return
    stock = module.optimized_attention

    @functools.wraps(stock)
    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        function = getattr(kwargs.get(ARGUMENT), "function", None)
        options = kwargs.get("transformer_options") or {}
        own = getattr(options.get(OVERRIDE), "prescribed", None)
        if function is not None and own is not None:
            kwargs["transformer_options"] = {**options, OVERRIDE: own(function)}
        out: torch.Tensor = stock(*args, **kwargs)
        return out

    with own_attribute(module, "optimized_attention", attention):
        yield

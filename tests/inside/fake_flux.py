"""FLUX.1 without data: its model and its arguments, as tensors of a card that is not there.

Runs in: a ComfyUI process of ``process.py``.

torch's FakeTensorMode: tensors have a device, a dtype and a shape. The true width, and as many
tokens as an image of 1024 x 1024 has, need neither card nor memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import comfy.ops
import torch
from families import flux
from torch._subclasses.fake_tensor import FakeTensorMode

from comfy_xdit_patch.worker.shard.later_columns import LaterColumns

CARD = "cuda:0"
DTYPE = torch.bfloat16
FLUX1 = {"hidden": 3072, "context": 4096}
LATENT = (128, 128)
"""Of an image of 1024 x 1024: 4096 tokens."""
MODE = FakeTensorMode(allow_non_fake_inputs=False)
"""One for all bodies: a tensor of one mode is a stranger in another."""
_models: dict[tuple[tuple[int, ...], str], Any] = {}


def model_of(blocks: Sequence[int], stored: str, *, is_own: bool = False) -> Any:
    """Make the model on the card, with the operations that ComfyUI chooses for stored weights.

    Args:
        is_own: whether it will be changed, so that nobody else can have it.
    """
    key = tuple(blocks), stored
    if key in _models and not is_own:
        return _models[key]
    dtype = getattr(torch, stored)
    sizes = {"double": blocks[0], "single": blocks[1], **FLUX1}
    operations = comfy.ops.pick_operations(dtype, DTYPE)
    model = flux("dev", **sizes, dtype=dtype, device=CARD, operations=operations)
    return model if is_own else _models.setdefault(key, model)


@functools.cache
def later_of(model: Any) -> LaterColumns:
    """What a model leaves for later: as long as there is the model, as for a rank that holds it."""
    return LaterColumns(model)


def arguments(
    *,
    text: int,
    batch: int = 1,
    references: Sequence[Sequence[int]] = (),
    mask: bool = False,
    device: str = CARD,
) -> dict[str, Any]:
    """Make arguments of ``Flux._forward``. Sizes of latents, and a count of text tokens."""

    def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device=device)

    given: dict[str, Any] = {
        "x": empty(16, *LATENT),
        "timestep": empty(dtype=torch.float32),
        "context": empty(text, FLUX1["context"]),
        "y": empty(768),
        "guidance": empty(dtype=torch.float32),
        "transformer_options": {},
    }
    if references:
        given["ref_latents"] = [empty(16, *size) for size in references]
    if mask:
        latents = (LATENT, *references)
        tokens = text + sum(-(-height // 2) * -(-width // 2) for height, width in latents)
        given["attention_mask"] = empty(tokens, tokens)
    return given

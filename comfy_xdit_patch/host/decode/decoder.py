"""A VAE's decoder as ComfyUI holds it, and what the ranks are given of it.

Runs in: host process. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from comfy_xdit_patch.blame import origin
from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.wire.decoders import arguments_of, attributes_of
from comfy_xdit_patch.wire.fingerprint import Fingerprint, Look, stored_weights
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.plain_attributes import Attributes
from comfy_xdit_patch.wire.tensors import PLAIN_CLASSES, ForeignTensorError

PREFIX = "decoder."
PATCHES = (
    *("patches", "object_patches", "hook_patches", "weight_wrapper_patches"),
    *("additional_models", "injections"),
)
"""Of a ModelPatcher: what nodes change a model by."""
LOOK = Look(seed=1)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder, and its VAE's ModelPatcher; seen by the rest of this package as a model is."""

    diffusion_model: Any
    current_patcher: Any

    @classmethod
    def of(cls, module: Any) -> Decoder | Refusal:
        """Return a VAE's decoder, or how it differs from what the VAE's file would make."""
        import comfy.ldm.modules.diffusionmodules.model as stock
        import comfy.model_management

        patchers = (loaded.model for loaded in comfy.model_management.current_loaded_models)
        patcher = next(
            (p for p in patchers if p is not None and getattr(p.model, "decoder", None) is module),
            None,
        )
        if patcher is None:
            return Refusal("a node calls the VAE's decoder itself", Scope.STEP)
        if any(getattr(patcher, name, None) for name in PATCHES):
            return Refusal("a node patched the VAE", Scope.STEP)
        own = vars(module).get("forward")
        if own is not None:
            return Refusal(f"the VAE's decoder has a forward of its own: {origin(own)}", Scope.STEP)
        attend = module.mid.attn_1.optimized_attention
        if getattr(stock, getattr(attend, "__name__", ""), None) is not attend:
            return Refusal(f"the VAE's attention is not ComfyUI's: {origin(attend)}", Scope.STEP)
        return cls(module, patcher)


@dataclass(frozen=True, slots=True)
class Carried:
    """What the ranks are told of a decoder; ``key`` names all of it."""

    key: str
    arguments: dict[str, Tree]
    weights: dict[str, Tree]
    attributes: Attributes


class CarriedDecoders:
    """Decoders whose weights one crew was given. They stay as long as ComfyUI keeps the VAE."""

    def __init__(self, _: Crew) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Carried] = weakref.WeakKeyDictionary()

    def of(self, crew: Crew, decoder: Decoder, dtype: torch.dtype) -> Carried:
        """Return a decoder with weights of a dtype, in shared memory.

        Weights that are known are looked at, in 2048 places of each.

        Raises:
            ForeignTensorError: a weight is of a class that cannot be carried.
            NoRoomError: the weights would take too much memory.
        """
        module, patcher = decoder.diffusion_model, decoder.current_patcher
        name = Fingerprint(module, manual_cast_dtype=dtype, patcher=patcher, prefix=PREFIX)
        attributes = attributes_of(module)
        text = f"{name.of(LOOK)} {name.versions} {sorted(attributes.items())}"
        key = hashlib.sha256(text.encode()).hexdigest()
        known = self._known.get(module)
        if known is not None and known.key == key:
            return known
        stored = list(stored_weights(module, patcher, prefix=PREFIX))
        for weight in stored:
            if type(weight.tensor) not in PLAIN_CLASSES:
                raise ForeignTensorError(type(weight.tensor).__name__)
        tensors = [weight.tensor.to(dtype) for weight in stored]
        trees = crew.packs.place(tensors, owner=module)
        weights = dict(zip((weight.name for weight in stored), trees, strict=True))
        carried = Carried(key, arguments_of(module), weights, attributes)
        self._known[module] = carried
        return carried

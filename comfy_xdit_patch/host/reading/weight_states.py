"""What a ModelPatcher makes of its model's weights, in a form that the workers can be given.

Runs in: host process. Reads ComfyUI's objects, changes nothing.

    patches    LoRAs and merges, applied once (ModelPatcher.patches)
    hooks      patches laid over those for some of the calls (ModelPatcher.current_hooks)
    bypass     adapters that layers compute beside their weights (BypassForwardHook)
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.wire.fingerprint import is_dynamic
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.packs import NoRoomError, PackTable
from comfy_xdit_patch.wire.values import UncarriedValueError
from comfy_xdit_patch.wire.weight_patches import PatchEncoder, is_quantised

REMEMBERED_STATES = 8
"""Encodings kept for a model: the stacks of LoRAs that a user switches between."""

BypassHooks = Mapping[str, Sequence[Any]]
"""ComfyUI's bypass hooks by the name of their module in the diffusion model."""


@dataclass(frozen=True, slots=True)
class WeightState:
    """One state of a model's weights.

    ``key`` depends on contents only: what ComfyUI numbers anew but leaves the same is the same.
    ``is_hooked`` says that patches of hooks lie over the others.
    """

    tree: Tree
    key: str
    is_hooked: bool = False
    made: list[torch.Tensor] = field(default_factory=list)


class WeightStates:
    """Encodes the states of ModelPatchers, each once."""

    def __init__(self, packs: PackTable) -> None:
        self._packs = packs
        self._known: weakref.WeakKeyDictionary[Any, dict[Any, WeightState]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, base_model: Any, bypass: BypassHooks) -> WeightState | Refusal:
        """Return the state that the model's current ModelPatcher asks for.

        Args:
            bypass: the bypass hooks that are on the model.
        """
        patcher = base_model.current_patcher
        known = self._known.setdefault(base_model, {})
        identity = (
            patcher.patches_uuid,
            patcher.object_patches.get("manual_cast_dtype"),
            patcher.force_cast_weights,
            _scheduled(patcher),
            tuple((name, weakref.ref(hook)) for name in sorted(bypass) for hook in bypass[name]),
        )
        state = known.pop(identity, None)
        if state is None:
            try:
                encoded = self._encode(patcher, bypass)
            except UncarriedValueError as error:
                return Refusal(f"a weight patch holds {error}")
            except NoRoomError as error:
                return Refusal(f"the weight patches do not fit in memory: {error}")
            if isinstance(encoded, Refusal):
                return encoded
            state = encoded
        known[identity] = state  # Last in the dictionary: used last.
        while len(known) > REMEMBERED_STATES:
            del known[next(iter(known))]
        return state

    def _encode(self, patcher: Any, bypass: BypassHooks) -> WeightState | Refusal:
        import comfy.hooks

        combined = patcher.get_combined_hook_patches(patcher.current_hooks)
        remembers = patcher.hook_mode is not comfy.hooks.EnumHookMode.MinVram
        if remembers and any(is_quantised(patcher.model, key) for key in combined):
            # ComfyUI puts what it remembers of such a weight back as if it were not quantised.
            return Refusal("several groups of hooks patch quantised weights")
        plain, laid_over, beside = PatchEncoder(), PatchEncoder(), PatchEncoder()
        dtype = patcher.object_patches.get("manual_cast_dtype")
        tree = {
            "patches": plain.encode(patcher.patches, self._packs.place),
            "manual_cast_dtype": None if dtype is None else str(dtype),
            "weight_patch_dtype": _weight_patch_dtype(patcher),
            "force_cast_weights": bool(patcher.force_cast_weights),
            "hooks": _named(laid_over.encode(combined, self._packs.place)),
            "bypass": _named(beside.encode_bypass(bypass, self._packs.place)),
        }
        made = [*plain.made, *laid_over.made]
        return WeightState(tree, _digest(tree), is_hooked=bool(combined), made=made)


def _weight_patch_dtype(patcher: Any) -> str | None:
    """In what a dynamic host computes a weight's patches: in its layer's dtype, at first use.

    None on other hosts, and where nothing is patched.
    """
    if not patcher.patches or not is_dynamic(patcher):
        return None
    return str(patcher.model.get_dtype_inference())


def _scheduled(patcher: Any) -> tuple[Any, ...]:
    """Which hooks patch the weights now, and how strongly: a keyframe changes that."""
    hooks = getattr(patcher.current_hooks, "hooks", ())
    return tuple((h.hook_ref, h.strength) for h in hooks if h.hook_ref in patcher.hook_patches)


def _named(tree: Tree) -> Tree:
    return {"key": _digest(tree), "tree": tree} if tree else None


def _digest(tree: Tree) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()

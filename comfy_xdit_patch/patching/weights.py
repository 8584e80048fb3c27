"""What a ModelPatcher makes of its model's weights, in a form that the workers can be given.

Runs in: host process. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.transport.calls import Tree
from comfy_xdit_patch.transport.packs import NoRoomError, PackTable
from comfy_xdit_patch.transport.patches import PatchEncoder, UncarriedPatchError

REMEMBERED_STATES = 8
"""Encodings kept for a model: the stacks of LoRAs that a user switches between."""


@dataclass(frozen=True, slots=True)
class WeightState:
    """One state of a model's weights.

    ``key`` depends on contents only: what ComfyUI numbers anew but leaves the same is the same.
    """

    tree: Tree
    key: str
    made: list[torch.Tensor] = field(default_factory=list)


class WeightStates:
    """Encodes the state of a ModelPatcher, once for each of its ``patches_uuid``."""

    def __init__(self, packs: PackTable) -> None:
        self._packs = packs
        self._known: weakref.WeakKeyDictionary[Any, dict[Any, WeightState]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, base_model: Any) -> WeightState | Refusal:
        """Return the state that the model's current ModelPatcher asks for."""
        patcher = base_model.current_patcher
        known = self._known.setdefault(base_model, {})
        dtype = patcher.object_patches.get("manual_cast_dtype")
        uuid = (patcher.patches_uuid, dtype, patcher.force_cast_weights)
        state = known.pop(uuid, None)
        if state is None:
            encoder = PatchEncoder()
            try:
                patches = encoder.encode(patcher.patches, self._packs.place)
            except UncarriedPatchError as error:
                return Refusal(f"a weight patch holds {error}")
            except NoRoomError as error:
                return Refusal(f"the weight patches do not fit in memory: {error}")
            tree = {
                "patches": patches,
                "manual_cast_dtype": None if dtype is None else str(dtype),
                "force_cast_weights": bool(patcher.force_cast_weights),
            }
            key = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
            state = WeightState(tree, key, encoder.made)
        known[uuid] = state  # Last in the dictionary: used last.
        while len(known) > REMEMBERED_STATES:
            del known[next(iter(known))]
        return state

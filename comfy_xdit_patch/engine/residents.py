"""The models that a rank holds, each in one state of its weights.

Runs in: worker process.

    file or packs --load--> stored weights --ComfyUI's patch lists--> weights in use

ComfyUI's own memory manager works in this process as it does in any: it moves a model to the
device, patches it, and makes room by taking another one off. What it takes off goes back to the
mapped file and not to a copy in this process.
"""

from __future__ import annotations

import ctypes
import gc
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit_patch.engine.groups import Groups
from comfy_xdit_patch.engine.loading import load_patcher
from comfy_xdit_patch.engine.placing import Progress, place_sharded, place_whole
from comfy_xdit_patch.engine.weight_sharding import ShardedBlocks
from comfy_xdit_patch.engine.whole_tensor import scaled_layers
from comfy_xdit_patch.transport.calls import Tree
from comfy_xdit_patch.transport.fingerprint import PREFIX, digests, fingerprint, stored_weights
from comfy_xdit_patch.transport.messages import Load
from comfy_xdit_patch.transport.packs import PackMap
from comfy_xdit_patch.transport.patches import decode
from comfy_xdit_patch.transport.skeleton import build
from comfy_xdit_patch.transport.slots import SlotMap
from comfy_xdit_patch.transport.tensors import flatten


@dataclass(slots=True)
class Resident:
    """One model.

    ``patcher`` is ComfyUI's for the weights as they are stored, ``current`` its clone with the
    patches of the state ``key``. ``blocks`` are this rank's weight shards, where it has some.
    ``is_placed`` says that the weights in use are on the device.
    """

    patcher: Any
    fingerprint: str
    stored: dict[str, torch.Tensor]
    current: Any
    scaled: dict[str, Any]
    key: str = ""
    mode: str = "full"
    blocks: ShardedBlocks | None = None
    is_placed: bool = False
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def flux(self) -> Any:
        """ComfyUI's ``Flux`` module."""
        return self.patcher.model.diffusion_model

    @property
    def bytes_held(self) -> int:
        """Bytes of the weights that this rank uses, shards counted as what they are."""
        shards = 0 if self.blocks is None else self.blocks.bytes_held
        return shards + sum(
            part.nbytes
            for _, weight in stored_weights(self.flux, backup={})
            for part in flatten(weight)[0].values()
        )


class Residents:
    """All models of this rank, by number, in the order of their last use."""

    def __init__(self, slots: SlotMap, groups: Groups) -> None:
        self._packs = PackMap(slots.__getitem__)
        self._groups = groups
        self._models: dict[int, Resident] = {}

    @property
    def numbers(self) -> list[int]:
        return sorted(self._models)

    def take(self, message: Load, progress: Progress) -> tuple[Resident, bool]:
        """Hold a model in the state that the message asks for, on the device.

        Returns:
            The model, and whether it had to be loaded first.
        """
        resident = self._models.get(message.model)
        is_new = resident is None
        try:
            if resident is None:
                resident = self._models[message.model] = self._load(message)
            # ComfyUI's books hold ModelPatchers weakly: the last one lives until the next is in.
            before = resident.current
            if (resident.key, resident.mode) != (message.key, message.mode):
                if "sharded" in (resident.mode, message.mode):
                    _take_off(resident)
                resident.current = self._patched(resident.patcher, message.state)
                resident.key, resident.mode = message.key, message.mode
                resident.is_placed, resident.digests = False, {}
            if message.verify and not resident.digests:
                resident.is_placed = False
            self._make_room(resident, message.room_bytes)
            self._place(resident, verify=message.verify, progress=progress)
            del before
        except BaseException:
            # Half a state is none: the next request begins with the file.
            self.drop([message.model])
            raise
        return resident, is_new

    def get(self, number: int) -> Resident | None:
        """Return a model, placed on the device, or None if this rank does not hold it."""
        resident = self._models.get(number)
        if resident is not None:
            self._place(resident, verify=False, progress=lambda _: None)
        return resident

    def give_way(self) -> None:
        """Give the device's memory back. Models return from the mapped files."""
        import comfy.model_management

        for resident in self._models.values():
            _take_off(resident)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()

    def drop(self, numbers: list[int] | None = None) -> None:
        """Forget models, all of them by default, and free their memory."""
        import comfy.model_management

        for number in self.numbers if numbers is None else numbers:
            resident = self._models.pop(number, None)
            if resident is not None:
                _take_off(resident)
                del resident
        if not self._models:
            comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()
        # What the C library keeps for later is nobody's: give it back too.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def _make_room(self, resident: Resident, room_bytes: int | None) -> None:
        """Take models off, the one used longest ago first, until the others fit beside this one."""
        others = [other for other in self._models.values() if other is not resident]
        size = sum(other.bytes_held for other in others if other.is_placed)
        for other in others:
            if room_bytes is None or size <= room_bytes:
                return
            if other.is_placed:
                size -= other.bytes_held
                _take_off(other)

    def _place(self, resident: Resident, *, verify: bool, progress: Progress) -> None:
        number = next(n for n, other in self._models.items() if other is resident)
        self._models[number] = self._models.pop(number)  # used last
        if resident.is_placed:
            return
        if resident.mode == "sharded":
            _take_off(resident)
            resident.blocks = place_sharded(
                resident.current,
                group=self._groups.weights,
                index=self._groups.rank,
                world_size=self._groups.world_size,
                digests=resident.digests if verify else None,
                progress=progress,
            )
        else:
            is_complete = resident.mode == "full"
            place_whole(resident.current, is_complete=is_complete, progress=progress)
            if verify:
                resident.digests = digests(resident.flux)
        resident.is_placed = True
        for other in self._models.values():
            if other is not resident and other.blocks is None and other.is_placed:
                _follow_comfyui(other)

    def _patched(self, patcher: Any, state: Tree) -> Any:
        """Return a clone of the ModelPatcher with the patches of a state, or itself for none."""
        dtype = state["manual_cast_dtype"]
        if not (state["patches"] or state["force_cast_weights"] or dtype is not None):
            return patcher
        current = patcher.clone()
        current.patches = decode(state["patches"], self._packs.tensor)
        current.patches_uuid = uuid.uuid4()
        current.force_cast_weights = state["force_cast_weights"]
        if dtype is not None:
            current.add_object_patch("manual_cast_dtype", _dtype(dtype))
        return current

    def _load(self, message: Load) -> Resident:
        if message.source is not None:
            patcher = load_patcher(message.source)
        else:
            patcher = build(message.tensors, self._packs.tensor)
        model = patcher.model
        name = fingerprint(model.diffusion_model, manual_cast_dtype=model.manual_cast_dtype)
        stored = {PREFIX + key: value for key, value in model.diffusion_model.named_parameters()}
        return Resident(patcher, name, stored, patcher, scaled_layers(model.diffusion_model))


def _take_off(resident: Resident) -> None:
    """Take a model off the device: its weights are the file's again, and nothing is moved."""
    resident.is_placed = False
    if resident.blocks is not None:
        resident.blocks.release(restore=False)
        resident.blocks = None
    _to_file(resident)
    resident.current.detach()


def _to_file(resident: Resident) -> None:
    """Put the stored weights in the place of those on the device, which are so freed unmoved."""
    import comfy.utils

    for key, tensor in resident.stored.items():
        comfy.utils.set_attr_param(resident.patcher.model, key, tensor)


def _follow_comfyui(resident: Resident) -> None:
    """See whether ComfyUI took a model off the device, in whole or in part, for another one."""
    model = resident.patcher.model
    if model.current_weight_patches_uuid is None:
        resident.is_placed = False
        _to_file(resident)
    elif model.model_lowvram and resident.mode == "full":
        resident.is_placed = False


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype

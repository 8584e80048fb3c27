"""The models that a rank holds, each in one state of its weights.

Runs in: worker process.

    file or packs --load--> stored weights --ComfyUI's patch lists--> weights in use

ComfyUI's own memory manager works in this process as it does in any: it moves a model to the
device, patches it, and makes room by taking another one off. What it takes off goes back to the
mapped file and not to a copy in this process.
"""

from __future__ import annotations

import gc
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit_patch.engine.loading import load_patcher
from comfy_xdit_patch.engine.whole_tensor import scaled_layers
from comfy_xdit_patch.transport.fingerprint import PREFIX, digests, fingerprint
from comfy_xdit_patch.transport.messages import Load, Tree
from comfy_xdit_patch.transport.packs import PackMap
from comfy_xdit_patch.transport.patches import decode
from comfy_xdit_patch.transport.skeleton import build
from comfy_xdit_patch.transport.slots import SlotMap


@dataclass(slots=True)
class Resident:
    """One model.

    ``patcher`` is ComfyUI's for the weights as they are stored, ``current`` its clone with the
    patches of the state ``key``.
    """

    patcher: Any
    fingerprint: str
    stored: dict[str, torch.Tensor]
    current: Any
    scaled: dict[str, Any]
    key: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def flux(self) -> Any:
        """ComfyUI's ``Flux`` module."""
        return self.patcher.model.diffusion_model


class Residents:
    """All models of this rank, by number."""

    def __init__(self, slots: SlotMap) -> None:
        self._packs = PackMap(slots.__getitem__)
        self._models: dict[int, Resident] = {}
        self._on_device: int | None = None

    @property
    def numbers(self) -> list[int]:
        return sorted(self._models)

    def take(self, message: Load) -> tuple[Resident, bool]:
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
            if resident.key != message.key:
                resident.current = self._patched(resident.patcher, message.state)
                resident.key = message.key
                self._on_device = None
            self.get(message.model)
            del before
        except BaseException:
            # Half a state is none: the next request begins with the file.
            self.drop([message.model])
            raise
        resident.digests = digests(resident.flux) if message.verify else {}
        return resident, is_new

    def get(self, number: int) -> Resident | None:
        """Return a model, complete on the device, or None if this rank does not hold it."""
        resident = self._models.get(number)
        if resident is not None and self._on_device != number:
            import comfy.model_management

            comfy.model_management.load_models_gpu([resident.current], force_full_load=True)
            self._on_device = number
            for other in self._models.values():
                if other is not resident:
                    _back_to_file(other)
        return resident

    def give_way(self) -> None:
        """Give the device's memory back. Models return from the mapped files."""
        import comfy.model_management

        self._on_device = None
        for resident in self._models.values():
            _to_file(resident)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()

    def drop(self, numbers: list[int] | None = None) -> None:
        """Forget models, all of them by default, and free their memory."""
        import comfy.model_management

        self._on_device = None
        for number in self.numbers if numbers is None else numbers:
            resident = self._models.pop(number, None)
            if resident is not None:
                _to_file(resident)
                resident.current.detach()
                del resident
        if not self._models:
            comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()

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


def _to_file(resident: Resident) -> None:
    """Put the stored weights in the place of those on the device, which are so freed unmoved."""
    import comfy.utils

    for key, tensor in resident.stored.items():
        comfy.utils.set_attr_param(resident.patcher.model, key, tensor)


def _back_to_file(resident: Resident) -> None:
    """The same for a model that ComfyUI took off the device, completely or in part."""
    model = resident.patcher.model
    if model.model_loaded_weight_memory == 0 and model.current_weight_patches_uuid is None:
        _to_file(resident)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype

"""A worker's side of the slots: tensors by number, on the worker's device.

Runs in: worker.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.slots import Slot
from comfy_xdit_patch.wire.values import decode_value


class SlotMap:
    """Slots by number; a tensor is copied to the device once for each version."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: dict[int, Slot] = {}
        self._on_device: dict[int, tuple[int, torch.Tensor]] = {}

    def add(self, number: int, fd: int, size_bytes: int) -> None:
        """Map a slot; the descriptor is closed."""
        try:
            self._slots[number] = Slot(number, fd, size_bytes)
        finally:
            os.close(fd)

    def drop(self, numbers: list[int]) -> None:
        """Forget slots that the host gave up."""
        for number in numbers:
            self._slots.pop(number, None)
            self._on_device.pop(number, None)

    def __getitem__(self, number: int) -> Slot:
        return self._slots[number]

    def fetch(self, tree: Tree) -> Any:
        """Turn a tree of ``SlotTable.place`` back into arguments."""
        return decode_value(tree, {"$slot": self._tensor, "$modulation": self._modulation})

    def _tensor(self, place: Tree) -> torch.Tensor:
        number, placed_version, dtype, shape = place
        shared = self._slots[number].view(getattr(torch, dtype), tuple(shape))
        if self._device.type == "cpu":
            return shared
        version, tensor = self._on_device.get(number, (-1, shared))
        if version != placed_version:
            tensor = shared.to(self._device)
            self._on_device[number] = (placed_version, tensor)
        return tensor

    def _modulation(self, parts: Tree) -> Any:
        import comfy.ldm.flux.layers

        return comfy.ldm.flux.layers.ModulationOut(*self.fetch(parts))

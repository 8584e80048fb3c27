"""A worker's side of the slots: tensors by number, on the worker's device.

Runs in: worker.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from comfy_xdit_patch.wire.messages.requests import SlotRef, Tree
from comfy_xdit_patch.wire.slots import Slot


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
        if isinstance(tree, dict):
            if "$slot" in tree:
                slot, version, dtype, shape = tree["$slot"]
                return self._tensor(SlotRef(slot, version, dtype, tuple(shape)))
            return {key: self.fetch(item) for key, item in tree.items()}
        if isinstance(tree, list):
            return [self.fetch(item) for item in tree]
        return tree

    def _tensor(self, ref: SlotRef) -> torch.Tensor:
        shared = self._slots[ref.slot].view(getattr(torch, ref.dtype), ref.shape)
        if self._device.type == "cpu":
            return shared
        version, tensor = self._on_device.get(ref.slot, (-1, shared))
        if version != ref.version:
            tensor = shared.to(self._device)
            self._on_device[ref.slot] = (ref.version, tensor)
        return tensor

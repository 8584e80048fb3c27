"""Places for tensors in memory that host and workers share.

Runs in: host and worker.

    host                                                    every worker
    SlotTable.place("context", t) -> {"$slot": [3, 7, ...]}  SlotMap.fetch(tree) -> view or
       slot 3, version 7: writes only if no slot of            device copy, made once a version
       "context" holds these very bytes already

Facts that shape this file.
    ComfyUI makes new conditioning tensors for every step, so identity says nothing: all bytes are
        compared before the call. Tensors on a GPU are compared there, for one answer that is waited
        for.
    ``memcmp`` ends at the first difference, and compares 4 MB that are equal in 0.2 ms;
        ``torch.equal`` of integers took as long on one thread, and 20 times as long on two threads
        of a machine that has other work.
    The host writes only while no worker computes, so slots need no lock.
    Between two steps the ranks' work has driven everything out of the caches, and each operation of
        torch is as slow as at its first use: a slot's view is made once.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.slot import Slot
from comfy_xdit_patch.wire.tensors import PLAIN_CLASSES, dtype_name, dtype_of
from comfy_xdit_patch.wire.values import (
    BASES,
    Kinds,
    UncarriedValueError,
    as_base,
    decode_value,
    encode_value,
)

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size."""
MODULATION = ("shift", "scale", "gate")
"""What ComfyUI's ``ModulationOut`` has: how a block is modulated."""
ALWAYS_NEW = ("x", "timestep", "timesteps")
"""Arguments that no step has from the one before."""
NUMBERS = ("timestep", "timesteps", "guidance")
"""Arguments of a number for each row: in CPU memory, their bytes travel in the message."""
MOST_BYTES_OF_NUMBERS = 256
SLOTS_A_PATH = 4
"""How many tensors of one argument are kept: cond and uncond of two regions."""
LARGE_BYTES = 8 << 20
"""Of larger tensors, such as a ControlNet's residuals, one is kept."""
SPARE_RESULTS = 2
"""Slots of results that nobody has any more, at most: cond and uncond may be two calls."""


def _as_it_reads(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in whose memory its values lie, as they are and in their order; itself if it is."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().contiguous()


def are_same_bytes(one: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Whether two tensors of a kind are alike, as a tensor: nothing is waited for.

    Bytes and not values: a NaN is itself, and -0.0 is not 0.0.
    """
    assert other is not None
    bits = BITS[one.element_size()]
    return (_as_it_reads(one).detach().view(bits) == other.view(bits)).all()


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


@dataclass(slots=True)
class _Entry:
    slot: Slot
    version: int = 0
    here: torch.Tensor | None = None
    """What it holds, in the slot itself."""
    device_copy: torch.Tensor | None = None
    last_used: int = 0

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the slot has this tensor, which lies in CPU memory: its kind, shape and bytes."""
        here = self.here
        if here is None or here.dtype != tensor.dtype or here.shape != tensor.shape:
            return False
        return bool(_memcmp(here.data_ptr(), tensor.data_ptr(), tensor.nbytes) == 0)

    def may_hold(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor on a device is like the one here, which is there too."""
        copy = self.device_copy
        return copy is not None and (copy.dtype, copy.shape, copy.device) == (
            tensor.dtype,
            tensor.shape,
            tensor.device,
        )


class SlotTable:
    """The host's side: puts the tensors of a call into slots, and only what changed."""

    def __init__(self) -> None:
        self._entries: dict[str, list[_Entry]] = {}
        self._results: list[Slot] = []
        self._created: list[tuple[Slot, int]] = []
        # Ranks that are lost take over no slot any more.
        weakref.finalize(self, _close, self._created).atexit = False
        self._dropped: list[int] = []
        self._placed: dict[int, tuple[torch.Tensor, Tree]] = {}
        self._found: dict[int, _Entry] = {}
        self._num_slots = 0
        self._clock = 0
        self.bytes_written = 0

    def place(self, path: str, value: Any) -> Tree:
        """Turn an argument into a tree whose tensors lie in slots.

        Args:
            path: the argument's name; inner values get ``name.0``, ``name.key``.

        Raises:
            UncarriedValueError: there are no words for a value.
        """
        return encode_value(value, self._place, path)

    def _place(self, path: str, value: Any) -> Tree:
        if type(value) in PLAIN_CLASSES and not value.is_sparse:
            is_small = path in NUMBERS and value.nbytes <= MOST_BYTES_OF_NUMBERS
            if is_small and not _is_on_device(value):
                return _in_message(value)
            return self._place_tensor(path, value)
        if isinstance(value, BASES):
            return self.place(path, as_base(value))
        if all(hasattr(value, name) for name in MODULATION):
            return {
                "$modulation": [self.place(f"{path}.{n}", getattr(value, n)) for n in MODULATION]
            }
        raise UncarriedValueError(f"{path} is a {type(value).__name__}")

    def begin_call(self) -> None:
        """Forget the tensors of the call before. What its slots hold is kept."""
        self._placed.clear()
        self._found.clear()

    def look_for(self, values: Mapping[str, Any]) -> None:
        """See which tensors on a device the slots have already, all with one wait for the device.

        A tensor on a device that nobody has looked for is taken to be new.

        Args:
            values: what is to be placed, by path. Those of ``ALWAYS_NEW`` are not looked for.
        """
        pairs = [
            (tensor, entry)
            for path, tensor in _device_tensors(values)
            if path.rpartition(".")[2] not in ALWAYS_NEW
            for entry in self._entries.get(path, ())
            if entry.may_hold(tensor)
        ]
        if pairs:
            flags = [are_same_bytes(tensor, entry.device_copy) for tensor, entry in pairs]
            for (tensor, entry), is_same in zip(pairs, torch.stack(flags).tolist(), strict=True):
                if is_same:
                    self._found[id(tensor)] = entry

    def result_slot(self, size_bytes: int) -> Slot:
        """Return a slot for results, large enough, in which nothing lies that somebody has."""
        spare = [slot for slot in self._results if not slot.is_lent]
        kept = [slot for slot in spare if slot.size_bytes >= size_bytes][:SPARE_RESULTS]
        for slot in spare:
            if slot not in kept:
                self._results.remove(slot)
                self._dropped.append(slot.number)
        if not kept:
            kept = [self.create(size_bytes)]
            self._results += kept
        return kept[0]

    def take_created(self) -> list[tuple[Slot, int]]:
        """Slots made since the last call, with their file descriptors, which the caller closes."""
        return [self._created.pop(0) for _ in range(len(self._created))]

    def take_dropped(self) -> list[int]:
        """Numbers of the slots given up since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _place_tensor(self, path: str, tensor: torch.Tensor) -> Tree:
        # A ControlNet hands one residual to many blocks: the same object is sent once.
        if id(tensor) in self._placed:
            return self._placed[id(tensor)][1]
        given, tensor = tensor, _as_it_reads(tensor)
        self._clock += 1
        is_here = not _is_on_device(tensor)
        if is_here:
            entry = next((e for e in self._entries.get(path, ()) if e.holds(tensor)), None)
        else:
            entry = self._found.get(id(given))
        if entry is None:
            tensor = tensor.detach()
            is_one = path in ALWAYS_NEW or tensor.nbytes > LARGE_BYTES
            entry = self._entry_for(
                path, max(tensor.nbytes, 1), max_entries=1 if is_one else SLOTS_A_PATH
            )
            if tensor.is_cuda:
                _ = entry.slot.is_registered  # So the driver copies straight to it.
            entry.here = entry.slot.view(tensor.dtype, tuple(tensor.shape))
            if is_here:
                ctypes.memmove(entry.here.data_ptr(), tensor.data_ptr(), tensor.nbytes)
            else:
                entry.here.copy_(tensor)
            entry.version += 1
            entry.device_copy = None if is_here or path in ALWAYS_NEW else tensor.clone()
            self.bytes_written += tensor.nbytes
        entry.last_used = self._clock
        dtype = dtype_name(tensor.dtype)
        tree = {"$slot": [entry.slot.number, entry.version, dtype, list(tensor.shape)]}
        self._placed[id(given)] = given, tree
        return tree

    def _entry_for(self, path: str, size_bytes: int, *, max_entries: int) -> _Entry:
        entries = self._entries.setdefault(path, [])
        if len(entries) >= max_entries:
            oldest = min(entries, key=lambda entry: entry.last_used)
            if oldest.slot.size_bytes >= size_bytes:
                return oldest
            entries.remove(oldest)
            self._dropped.append(oldest.slot.number)
        entry = _Entry(self.create(size_bytes))
        entries.append(entry)
        return entry

    def drop(self, number: int) -> None:
        """Give up a slot that ``create`` made."""
        self._dropped.append(number)

    def create(self, size_bytes: int) -> Slot:
        """Make a slot; ``take_created`` hands it out to be sent."""
        slot, fd = Slot.create(self._num_slots, size_bytes)
        self._num_slots += 1
        self._created.append((slot, fd))
        return slot


class SlotMap:
    """A worker's side: slots by number. A tensor is copied to the device once a version."""

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

    def fetch(self, tree: Tree, *, waits: bool = True) -> Any:
        """Turn a tree of ``SlotTable.place`` back into arguments.

        Args:
            waits: for copies to a GPU. Who does not must see to it that they have ended before the
                host is answered, which then writes to the slots again.
        """
        kinds: Kinds = {
            "$slot": partial(self._tensor, waits=waits),
            "$numbers": self._numbers,
            "$modulation": self._modulation,
        }
        return decode_value(tree, kinds)

    def _tensor(self, place: Tree, *, waits: bool) -> torch.Tensor:
        number, placed_version, dtype, shape = place
        slot = self._slots[number]
        shared = slot.view(dtype_of(dtype), tuple(shape))
        if self._device.type == "cpu":
            return shared
        version, tensor = self._on_device.get(number, (-1, shared))
        if version != placed_version:
            is_direct = self._device.type == "cuda" and slot.is_registered
            tensor = shared.to(self._device, non_blocking=is_direct and not waits)
            self._on_device[number] = (placed_version, tensor)
        return tensor

    def _numbers(self, tree: Tree) -> torch.Tensor:
        dtype, shape, numbers = tree
        data = torch.tensor(numbers, dtype=torch.uint8)
        return data.view(dtype_of(dtype)).view(shape).to(self._device)

    def _modulation(self, parts: Tree) -> Any:
        import comfy.ldm.flux.layers

        return comfy.ldm.flux.layers.ModulationOut(*self.fetch(parts))


def _close(created: list[tuple[Slot, int]]) -> None:
    for _, fd in created:
        os.close(fd)


def _in_message(tensor: torch.Tensor) -> Tree:
    """Bytes and not values: a NaN has some of its own."""
    data = tensor.detach().reshape(-1).view(torch.uint8).tolist()
    return {"$numbers": [dtype_name(tensor.dtype), list(tensor.shape), data]}


def _is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def _device_tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors on a device in arguments, by the path that ``SlotTable.place`` gives them."""
    for path, value in values.items():
        if isinstance(value, torch.Tensor) and _is_on_device(value):
            yield path, value
        elif isinstance(value, (list, tuple)):
            yield from _device_tensors({f"{path}.{i}": item for i, item in enumerate(value)})
        elif isinstance(value, dict):
            yield from _device_tensors({f"{path}.{key}": item for key, item in value.items()})

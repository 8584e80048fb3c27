"""Weight tensors in shared memory: LoRA matrices, models to merge, models without a file.

Runs in: host and worker.

    host                                             every worker
    PackTable.place(tensors) -> {"$pack": [...]}     PackMap.tensor -> view of the same memory

Facts that shape this file.
    A LoRA has a thousand small tensors: they share one piece of memory, sent once.
    A node that runs again makes a new ModelPatcher around the same LoRA tensors, and some formats
        are converted into new tensors of the same contents: identity is asked first, then contents.
    The copy lives as long as ComfyUI keeps the tensor. ComfyUI drops a LoRA as soon as another one
        takes its place, and users switch to and fro: the last ones dropped are kept for a while.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.system_memory import available_bytes
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.slot import Slot
from comfy_xdit_patch.wire.tensors import digest, dtype_name, dtype_of

ALIGNMENT = 64
KEPT_BYTES = 1 << 30
"""Contents that ComfyUI has dropped are kept up to this size together: about three LoRAs."""


class NoRoomError(Exception):
    """Weights to be carried would take more than half of the memory that is free."""


def check_room(num_bytes: int) -> None:
    """See whether so much memory may be taken: the system must never end ComfyUI for want of it.

    Raises:
        NoRoomError: it would take more than half of what is free.
    """
    free = available_bytes()
    if num_bytes > free // 2:
        raise NoRoomError(f"{num_bytes / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free")


class _Pack:
    """One piece of shared memory and how many living objects of the host it stands for."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.num_alive = 0


class _Place:
    """Where a tensor's contents lie."""

    def __init__(self, pack: _Pack, offset: int, tensor: torch.Tensor, contents: str) -> None:
        self.pack = pack
        dtype = dtype_name(tensor.dtype)
        self.tree: Tree = {
            "$pack": [pack.slot.number, offset, dtype, list(tensor.size()), contents]
        }


class PackTable:
    """The host's side: puts weight tensors into shared memory, each content once."""

    def __init__(self, create: Callable[[int], Slot], drop: Callable[[int], None]) -> None:
        """Prepare.

        Args:
            create: makes a slot of a size in bytes.
            drop: gives up a slot by number.
        """
        self._create = create
        self._drop = drop
        self._by_identity: dict[int, tuple[weakref.ref[torch.Tensor], int, _Place]] = {}
        self._by_content: dict[str, _Place] = {}
        self._owned: list[tuple[weakref.ref[Any], _Pack]] = []
        self._dead: list[int] = []
        self._kept: dict[int, _Pack] = {}
        self.bytes_written = 0

    def drop_kept(self) -> None:
        """Give up all contents that ComfyUI has dropped."""
        self._bury()
        self._trim(0)

    def place(self, tensors: Sequence[torch.Tensor], owner: Any = None) -> list[Tree]:
        """Put plain tensors into shared memory unless their contents lie there already.

        Args:
            owner: the object that the contents belong to and live with; by default each tensor
                itself.

        Returns:
            For each tensor a tree for a message.

        Raises:
            NoRoomError: they would take too much memory.
        """
        self._bury()
        places: dict[int, _Place] = {}
        new: dict[str, list[int]] = {}
        for index, tensor in enumerate(tensors):
            known = self._by_identity.get(id(tensor))
            if known is not None and known[0]() is tensor and known[1] == _version(tensor):
                places[index] = known[2]
                continue
            contents = digest(tensor)
            place = self._by_content.get(contents)
            if place is None:
                new.setdefault(contents, []).append(index)
            else:
                places[index] = place
        for contents, place in self._write(tensors, new).items():
            self._by_content[contents] = place
            places.update(dict.fromkeys(new[contents], place))
        for index, place in places.items():
            if owner is None:
                self._follow(tensors[index], place)
        if owner is not None:
            for pack in {place.pack for place in places.values()}:
                self._hold(pack)
                self._owned.append((weakref.ref(owner), pack))
        return [places[index].tree for index in range(len(tensors))]

    def _write(
        self, tensors: Sequence[torch.Tensor], new: dict[str, list[int]]
    ) -> dict[str, _Place]:
        if not new:
            return {}
        first = {contents: tensors[indices[0]] for contents, indices in new.items()}
        size = sum(_padded(tensor.nbytes) for tensor in first.values())
        check_room(size)
        pack = _Pack(self._create(max(size, ALIGNMENT)))
        places = {}
        offset = 0
        for contents, tensor in first.items():
            view = pack.slot.view(tensor.dtype, tuple(tensor.size()), offset=offset)
            view.copy_(tensor.detach())
            self.bytes_written += tensor.nbytes
            places[contents] = _Place(pack, offset, tensor, contents)
            offset += _padded(tensor.nbytes)
        return places

    def _follow(self, tensor: torch.Tensor, place: _Place) -> None:
        """Keep the contents as long as this tensor lives."""
        key = id(tensor)
        known = self._by_identity.get(key)
        if known is not None and known[0]() is tensor and known[2] is place:
            return
        # A callback may run in any thread, in the middle of anything: it only leaves a note.
        reference = weakref.ref(tensor, lambda _: self._dead.append(key))
        self._hold(place.pack)
        if known is not None:
            self._let_go(known[2].pack)
        self._by_identity[key] = (reference, _version(tensor), place)

    def _bury(self) -> None:
        while self._dead:
            key = self._dead.pop()
            known = self._by_identity.get(key)
            if known is not None and known[0]() is None:  # else a new tensor got this address
                del self._by_identity[key]
                self._let_go(known[2].pack)
        for item in [item for item in self._owned if item[0]() is None]:
            self._owned.remove(item)
            self._let_go(item[1])

    def _hold(self, pack: _Pack) -> None:
        pack.num_alive += 1
        self._kept.pop(pack.slot.number, None)

    def _let_go(self, pack: _Pack) -> None:
        pack.num_alive -= 1
        if pack.num_alive == 0:
            self._kept[pack.slot.number] = pack
            self._trim(KEPT_BYTES)

    def _trim(self, limit: int) -> None:
        """Give up the packs that were dropped first, until the rest is within the limit."""
        size = sum(pack.slot.size_bytes for pack in self._kept.values())
        while size > limit:
            number, pack = next(iter(self._kept.items()))
            del self._kept[number]
            size -= pack.slot.size_bytes
            self._drop(number)
            self._by_content = {
                contents: place
                for contents, place in self._by_content.items()
                if place.pack is not pack
            }


class Packing:
    """Tensors of one tree, which are placed together when the tree is whole."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._nodes: list[dict[str, Tree]] = []

    def add(self, tensor: torch.Tensor) -> Tree:
        """Return what stands for a tensor in the tree."""
        self._tensors.append(tensor)
        self._nodes.append({})
        return self._nodes[-1]

    def place(self, place: Callable[[Sequence[torch.Tensor]], list[Tree]]) -> None:
        """Fill the tree in. ``place`` is ``PackTable.place``, and raises what that raises."""
        for node, tree in zip(self._nodes, place(self._tensors), strict=True):
            node.update(tree)


class PackMap:
    """A worker's side: tensors in shared memory, each checked once against its digest."""

    def __init__(self, slots: Callable[[int], Slot]) -> None:
        """Prepare.

        Args:
            slots: finds a slot by number.
        """
        self._slots = slots
        self._checked: weakref.WeakKeyDictionary[Slot, set[tuple[int, str]]] = (
            weakref.WeakKeyDictionary()
        )

    def tensor(self, place: Tree) -> torch.Tensor:
        """The tensor of a ``$pack`` of ``PackTable.place``, in shared memory.

        Raises:
            MessageError: what lies there is not what the host put there.
        """
        number, offset, dtype, shape, contents = place
        slot = self._slots(number)
        found = slot.view(dtype_of(dtype), tuple(shape), offset=offset)
        checked = self._checked.setdefault(slot, set())
        if (offset, contents) not in checked:
            if digest(found) != contents:
                raise MessageError(
                    f"The weights at byte {offset} of slot {number} are {digest(found)} and not "
                    f"{contents}, as ComfyUI has them."
                )
            checked.add((offset, contents))
        return found


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _version(tensor: torch.Tensor) -> int:
    """PyTorch's count of in-place changes; tensors made in inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version

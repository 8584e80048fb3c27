"""Keep 1/N of every block's weights on each rank; gather a block just before it runs.

Runs in: worker process.

The pattern is FSDP2's: one unit for each block, two window buffers, the next unit's gather started
before the block computes. FSDP2 itself keeps a ``DTensor`` for each parameter and shards its first
dimension; ComfyUI's weights are float8, quantised wrappers and GGUF blocks, and its modules read
``self.weight`` as an attribute. So a unit here is bytes, and its tensors are views of a window
(``flat_layout.py``). Nothing of ComfyUI is replaced: hooks put a block's parameters in place and
take them out again.

    block i      | enter: wait i, install i, start i+1 | compute i | leave: placeholders |
    window A     | unit i   ................................       | gather of i+2 ...
    window B     |                      gather of i+1 ...

On CUDA no stream of our own is needed. An asynchronous NCCL collective runs on the communicator's
stream: it waits for what the compute stream was given before it (the end of block i-1, the last
reader of the window that is written), and ``wait()`` makes the compute stream wait for it, not the
CPU. Shards and windows live as long as this object, so that the allocator reuses neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.weights.flat_layout import ALIGNMENT, FlatLayout, Recipe, round_up

Bake = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a weight's name in the diffusion model and the whole weight; returns it patched."""

# In the order in which ``Flux.forward_orig`` runs them.
NUM_WINDOWS = 2


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor belongs: a module's dictionary of parameters or of buffers."""

    owner: dict[str, Any]
    name: str
    is_parameter: bool
    recipe: Recipe
    placeholder: torch.Tensor

    def make(self, flat: torch.Tensor) -> torch.Tensor:
        tensor = self.recipe(flat)
        return as_parameter(tensor) if self.is_parameter else tensor


@dataclass(frozen=True, slots=True)
class _Unit:
    """One block: this rank's weight shard, and every tensor's place."""

    shard: torch.Tensor
    places: list[_Place]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Gather:
    """A gather under way."""

    unit: int
    window: int
    work: Any


class ShardedBlocks:
    """The blocks of one FLUX module, with 1/N of their weights on each rank.

    Args:
        flux: ComfyUI's ``Flux``, its weights in (mapped) CPU memory or on the device.
        group: the ranks that share the weights, and nobody else's communication: on NCCL a gather
            in the group of the all-to-alls would be queued in front of them.
        index: this rank's place in ``group``.
        bake: called with each whole weight on the device before it is cut, e.g. to apply weight
            patches, so that the bits are those of a whole load. Without it only this rank's bytes
            are read from each weight.

    Collective:
        Every forward of a block. All ranks of ``group`` run, or skip, the same blocks in the same
        order.
    """

    def __init__(
        self,
        flux: Any,
        *,
        group: dist.ProcessGroup,
        index: int,
        world_size: int,
        device: torch.device,
        bake: Bake | None = None,
    ) -> None:
        self._group = group
        self._index = index
        self._world_size = world_size
        self._device = device
        self.bytes_gathered = 0
        """Bytes that this rank received from others."""
        self.wait_s = 0.0
        """How long the CPU waited for gathers. On CUDA, ``wait()`` does not block the CPU."""
        blocks = [
            (f"{name}.{number}", block)
            for name in BLOCK_LISTS
            for number, block in enumerate(getattr(flux, name))
        ]
        self._units = [self._take(name, block, bake) for name, block in blocks]
        largest = max(unit.shard.numel() for unit in self._units) * world_size
        windows = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(NUM_WINDOWS)
        ]
        self._windows = windows
        # Made once: a thousand views each forward would cost as much CPU time as the blocks.
        self._views = [
            [[place.make(window) for place in unit.places] for unit in self._units]
            for window in windows
        ]
        self._window_in_use = 0
        self._pending: _Gather | None = None
        self._hooks = []
        for unit_index, (_, block) in enumerate(blocks):
            self._hooks += [
                block.register_forward_pre_hook(partial(self._enter, unit_index)),
                # Also after an exception: a failed forward must not leave views of a window.
                block.register_forward_hook(partial(self._leave, unit_index), always_call=True),
            ]

    @property
    def bytes_held(self) -> int:
        """Bytes of weight shards on this rank, alignment included; windows are not."""
        return sum(unit.shard.numel() for unit in self._units)

    @property
    def bytes_window(self) -> int:
        """Bytes of both windows."""
        return sum(window.numel() for window in self._windows)

    @property
    def bytes_whole(self) -> int:
        """Bytes of all blocks' weights."""
        return sum(unit.num_bytes for unit in self._units)

    def prefetch_first(self) -> None:
        """Start the gather of the first block, to hide it behind what runs before the blocks.

        Collective.
        """
        self._expect(0)

    def release(self, *, restore: bool) -> None:
        """Take the hooks out and drop shards and windows.

        Args:
            restore: give the modules whole parameters again, on the device. Collective. Otherwise
                they keep empty placeholders.
        """
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._views.clear()
        self._windows.clear()
        for unit in self._units if restore else ():
            whole = unit.shard.new_empty(unit.shard.numel() * self._world_size)
            collectives.all_gather_into(whole, unit.shard, group=self._group)
            self.bytes_gathered += unit.shard.numel() * (self._world_size - 1)
            for place in unit.places:
                place.owner[place.name] = place.make(whole)
        self._units.clear()

    def _take(self, block_name: str, block: torch.nn.Module, bake: Bake | None) -> _Unit:
        """Cut one block's weights, and leave placeholders."""
        layout = FlatLayout()
        places = []
        for module_name, module in block.named_modules():
            for owner, is_parameter in ((module._parameters, True), (module._buffers, False)):
                for name, tensor in owner.items():
                    if tensor is None:
                        continue
                    if bake is not None and is_parameter:
                        whole_name = ".".join(filter(None, (block_name, module_name, name)))
                        tensor = bake(whole_name, tensor.to(self._device))
                    empty = torch.empty(0, dtype=tensor.dtype, device=self._device)
                    placeholder = as_parameter(empty) if is_parameter else empty
                    recipe = layout.add(tensor)
                    places.append(_Place(owner, name, is_parameter, recipe, placeholder))
        shard_bytes = round_up(-(-layout.num_bytes // self._world_size), ALIGNMENT)
        shard = torch.zeros(shard_bytes, dtype=torch.uint8, device=self._device)
        layout.copy_range(self._index * shard_bytes, shard)
        for place in places:
            place.owner[place.name] = place.placeholder
        return _Unit(shard, places, sum(data.numel() for _, data in layout.parts))

    def _enter(self, index: int, *_: Any) -> None:
        """Put a block's weights in place, and start the next block's gather."""
        self._expect(index)
        self._window_in_use = self.settle()
        views = self._views[self._window_in_use][index]
        for place, view in zip(self._units[index].places, views, strict=True):
            place.owner[place.name] = view
        if index + 1 < len(self._units):
            self._start(index + 1)

    def _leave(self, index: int, *_: Any) -> None:
        for place in self._units[index].places:
            place.owner[place.name] = place.placeholder

    def _expect(self, index: int) -> None:
        """Make sure that the gather under way is this block's."""
        if self._pending is None or self._pending.unit != index:
            # The first block of a forward; or all ranks skipped, or failed in, the block expected.
            self.settle()
            self._start(index)

    def _start(self, index: int) -> None:
        """Start a gather into the window that the block before did not use."""
        window, shard = 1 - self._window_in_use, self._units[index].shard
        whole = self._windows[window][: shard.numel() * self._world_size]
        work = collectives.all_gather_into_async(whole, shard, group=self._group)
        self._pending = _Gather(index, window, work)
        self.bytes_gathered += shard.numel() * (self._world_size - 1)

    def settle(self) -> int:
        """Wait for the gather under way, if any; return its window."""
        pending, self._pending = self._pending, None
        if pending is None:
            return self._window_in_use
        start = time.perf_counter()
        collectives.finish([pending.work])
        self.wait_s += time.perf_counter() - start
        return pending.window


def as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    """Return a weight of any class as what a module takes for a parameter."""
    if type(tensor) is torch.Tensor:
        return torch.nn.Parameter(tensor, requires_grad=False)
    # As ``torch.nn.Parameter`` marks subclasses; it would call ``detach``, which loses attributes.
    tensor._is_param = True
    return tensor

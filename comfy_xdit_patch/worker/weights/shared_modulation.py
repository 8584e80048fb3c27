"""Modulation sharding: each rank holds, and computes, 1/N of what modulates all blocks.

Runs in: worker process.

FLUX.1's blocks make their shifts, scales and gates from one row for each image (``vec``), by
linears that are 27 % of its weights. Sharing tokens divides neither their memory nor their reads.
Here a rank has some of their rows, in the format in which ComfyUI stores them, and ComfyUI's own
forward of the linear computes with those. When the first block of a call asks, every rank computes
its rows for all blocks, and one all-gather brings the rest; the other blocks find theirs ready.

    vec --> linear of block 0 | linear of block 1 | ...     this rank's outputs of each
        --> one all-gather --> outputs of every block, whole on every rank

All ranks of the world share the weights, whatever a plan has them share besides. Where they have
different rows of the batch, the rows are exchanged first, and each rank computes its outputs for
every part of the batch apart: as many rows at a time as the linear would have had, because a
product of more rows may round otherwise. Each output is a sum over inputs, all of which a rank has;
it does not depend on the other outputs, but for the kernel that a library chooses by their number.

Blocks that the host runs one by one (``shard/blocks.py``) are each given their own ``vec``: an
exchange for each of them.

A block that runs compiled is given its outputs as tensors beside its arguments, so that the
exchange lies outside of it. All blocks of a class share what is compiled: what stands in for a
linear is one function in all of them, and a place in the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.tensor_cuts import Cut, modulation_cuts
from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.wire.tensors import as_parameter, cut_to
from comfy_xdit_patch.worker.shard.compiled_blocks import entering
from comfy_xdit_patch.worker.shard.rank_tokens import gather_sequence
from comfy_xdit_patch.worker.weights.sharded_blocks import Bake

WHOLE_FORWARD = ""
"""Stands for all blocks where a block's name would stand for one."""
SHARED = "xdit_shared"
"""An attribute of ours on a linear and on its owner: what their forward needs of this file."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """One linear. ``forward`` is ComfyUI's, ``sizes`` are the outputs of every rank.

    ``owner`` is the module that calls it with what it makes of ``vec``.
    """

    name: str
    block: str
    owner: Callable[[torch.Tensor], Any]
    forward: Callable[[torch.Tensor], torch.Tensor]
    sizes: tuple[int, ...]


class SharedModulation:
    """The blocks of one model, whole but for their modulation.

    Args:
        flux: ComfyUI's ``Flux``, its weights in (mapped) CPU memory.
        group: all ranks.
        index: this rank's place in ``group``.
        bake: called with each whole weight on the device before it is cut, e.g. to apply weight
            patches.

    Collective:
        The forward of a call's first block; of every block, where they run one by one.
    """

    def __init__(
        self,
        flux: Any,
        *,
        group: dist.ProcessGroup,
        index: int,
        world_size: int,
        device: torch.device,
        bake: Bake,
    ) -> None:
        self.bytes_sent = 0
        """What this rank sent to others, by the formula of a ring all-gather."""
        self._group = group
        self._index = index
        self._world_size = world_size
        self._device = device
        self._plan = ParallelPlan(ulysses=world_size)
        self._num_rows = 1
        self._is_driven = False
        self._vec: torch.Tensor | None = None
        self._ready: dict[str, torch.Tensor] = {}
        """Outputs for ``_vec``, by linear."""
        self._orders: dict[str, torch.Tensor] = {}
        self._changes = ExitStack()
        cuts = modulation_cuts(flux, world_size)
        for name, module in flux.named_modules():
            if name.startswith(BLOCK_LISTS):
                self._place(name, module, cuts.get(name), bake)
        self._linears: dict[str, list[_Linear]] = {}
        """By block."""
        for name, cut in cuts.items():
            self._stand_in(flux, name, cut.sizes(world_size))

    def begin(self, plan: ParallelPlan, *, num_rows: int, is_driven: bool) -> None:
        """Say how the next forwards are shared.

        Args:
            num_rows: of the whole batch.
            is_driven: the host runs blocks one by one.
        """
        self._plan, self._num_rows, self._is_driven = plan, num_rows, is_driven
        self._vec = None
        self._ready.clear()

    def of_block(self, block: str, vec: torch.Tensor) -> list[torch.Tensor]:
        """Return what a block's linears return for ``vec``, for a block that runs compiled.

        Collective, where they are not ready.
        """
        linears = self._linears[block]
        if self._vec is not vec:
            linears[0].owner(vec)  # ComfyUI's own way to the linear
        return [self._ready[linear.name] for linear in linears]

    def release(self) -> None:
        """Undo what was changed in ComfyUI's blocks. The caller puts their weights back."""
        self._changes.close()
        self._linears.clear()
        self._orders.clear()
        self._ready.clear()
        self._vec = None

    def _place(self, name: str, module: Any, cut: Cut | None, bake: Bake) -> None:
        """Put a module's own weights on the device, and of a linear that is cut this rank's."""
        for key, tensor in list(module._parameters.items()):
            if tensor is None:
                continue
            weight = bake(f"{name}.{key}", tensor.to(self._device))
            if cut is not None and key in ("weight", "bias"):
                weight = cut_to(weight, cut.dim, cut.ranges(self._index, self._world_size))
            module._parameters[key] = as_parameter(weight)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = buffer.to(self._device)

    def _stand_in(self, flux: Any, name: str, sizes: tuple[int, ...]) -> None:
        """Have a linear return all outputs, and its owner say for which ``vec``."""
        module, owner = (flux.get_submodule(path) for path in (name, name.rpartition(".")[0]))
        block_list, number, *_ = name.split(".")
        linear = _Linear(name, f"{block_list}.{number}", owner, module.forward, sizes)
        of_block = self._linears.setdefault(linear.block, [])
        place = len(of_block)
        of_block.append(linear)
        for stood_in, forward, shared in (
            (module, _linear_forward, (place, partial(self._outputs, linear))),
            (owner, _owner_forward, self._note_vec),
        ):
            own = own_attribute(stood_in, "forward", MethodType(forward, stood_in))
            self._changes.enter_context(own)
            self._changes.enter_context(own_attribute(stood_in, SHARED, shared))

    def _note_vec(self, vec: torch.Tensor) -> None:
        # By identity: every block of a forward is given the same tensor, and to compare contents
        # would have the CPU wait for the device.
        if self._vec is not vec:
            self._vec = vec
            self._ready.clear()

    def _outputs(self, linear: _Linear, x: torch.Tensor) -> torch.Tensor:
        if linear.name not in self._ready:
            self._compute(linear.block if self._is_driven else WHOLE_FORWARD, x)
        return self._ready[linear.name]

    def _compute(self, block: str, x: torch.Tensor) -> None:
        """Compute the outputs of a block's linears, or of all, together with the other ranks.

        Shapes:
            ``x`` (rows, ..., D)
        """
        of_all = chain(*self._linears.values())
        linears = list(of_all) if block == WHOLE_FORWARD else self._linears[block]
        batches = self._batches(x)
        parts = [torch.cat([found.forward(x) for found in linears], dim=-1) for x in batches]
        # R rows of all parts of the batch, P outputs of this rank.
        own_RP = torch.cat([part.flatten(0, -2) for part in parts])
        sizes = tuple(map(sum, zip(*(found.sizes for found in linears), strict=True)))
        joined_RP = gather_sequence(own_RP.unsqueeze(-1), sizes=sizes, group=self._group).squeeze(2)
        self._count(own_RP.shape[0] * max(sizes) * own_RP.element_size())
        mine = self._plan.batch_index(self._index)
        first = sum(part.shape[:-1].numel() for part in parts[:mine])
        rows_RP = joined_RP[first : first + x.shape[:-1].numel()]
        if block not in self._orders:
            self._orders[block] = self._order(linears, sizes)
        whole = rows_RP.index_select(1, self._orders[block]).view(*x.shape[:-1], -1)
        outputs = torch.split(whole, [sum(found.sizes) for found in linears], dim=-1)
        self._ready |= {found.name: out for found, out in zip(linears, outputs, strict=True)}

    def _batches(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of every part of the batch; the ranks of one part have the same."""
        if self._plan.batch == 1:
            return [x]
        ranges = [self._plan.batch_rows(rank, self._num_rows) for rank in range(self._world_size)]
        num_rows = [end - first for first, end in ranges]
        # Two for each row of the batch where references have a time step of their own.
        for_each = x.shape[0] // num_rows[self._index]
        sizes = tuple(number * for_each for number in num_rows)
        joined = gather_sequence(x.transpose(0, 1), sizes=sizes, group=self._group).transpose(0, 1)
        self._count(max(sizes) * x[0].numel() * x.element_size())
        of_ranks = torch.split(joined, list(sizes))
        stride = self._world_size // self._plan.batch
        return [part.contiguous() for part in of_ranks[::stride]]

    def _order(self, linears: Sequence[_Linear], sizes: tuple[int, ...]) -> torch.Tensor:
        """Where each output lies among those that are joined: by rank, and then by linear."""
        starts = [sum(sizes[:rank]) for rank in range(self._world_size)]
        places = []
        for linear in linears:
            for rank, size in enumerate(linear.sizes):
                end = starts[rank] + size
                places.append(
                    torch.arange(starts[rank], end, dtype=torch.int32, device=self._device)
                )
                starts[rank] = end
        return torch.cat(places)

    def _count(self, num_bytes: int) -> None:
        self.bytes_sent += num_bytes * (self._world_size - 1)


def _linear_forward(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Return all outputs of a linear that this rank has a part of."""
    place, outputs = getattr(linear, SHARED)
    found: torch.Tensor = entering[place] if torch.compiler.is_compiling() else outputs(x)
    return found


def _owner_forward(owner: Any, vec: torch.Tensor) -> Any:
    """Call the linear as ComfyUI does, and note what for."""
    if not torch.compiler.is_compiling():
        getattr(owner, SHARED)(vec)
    return type(owner).forward(owner, vec)

"""Choose how each model's weights lie on the workers' cards, before they are loaded.

Runs in: host process.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.reading.models import flux_of
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.residency import (
    CUDA_CONTEXT_BYTES,
    MODES,
    NCCL_GROUP_BYTES,
    ON_CARDS,
    PIPELINE_MODES,
    RESERVED_BYTES,
    Card,
    Mode,
    ModelSizes,
    ResidencyPlan,
    plan_residency,
    token_load,
)
from comfy_xdit_patch.wire.casts import can_cast_once
from comfy_xdit_patch.wire.fingerprint import COMPILED, stored_weights
from comfy_xdit_patch.wire.messages.requests import Residence
from comfy_xdit_patch.wire.tensors import can_cut

_BLOCK = re.compile(r"((?:double|single)_blocks\.\d+)\.")
_MODULATION = re.compile(
    r"(?:double|single)_blocks\.\d+\.(?:img_mod|txt_mod|modulation)\.lin\.(.+)"
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one model's weights lie, and what other models may take on a card beside them.

    ``room_bytes`` is None where nothing limits it, or where ComfyUI's own manager does.
    """

    residence: Residence
    room_bytes: int | None
    needed_bytes: int | None = None
    """What a rank takes on its card beside the contexts, which are there already."""
    working_bytes: int = 0
    """What a call of this size takes of that; 0 where nothing limits it."""

    def leaves(self, held_bytes: int) -> bool:
        """Whether what is held already fits into the room beside this model."""
        return self.room_bytes is None or held_bytes <= self.room_bytes


class Residency:
    """The mode of every model on a crew's cards; it only changes towards one that needs less."""

    def __init__(self, crew: Crew, *, budget_bytes: int | None) -> None:
        self._budget = budget_bytes
        self._joined = [crew.joined[rank] for rank in range(crew.world_size)]
        self._modes: weakref.WeakKeyDictionary[Any, Mode] = weakref.WeakKeyDictionary()
        self._sizes: weakref.WeakKeyDictionary[Any, ModelSizes] = weakref.WeakKeyDictionary()
        self.arithmetic: list[str] = []
        """How the last choice came about."""

    def place(
        self,
        base_model: Any,
        workload: Workload,
        plan: ParallelPlan,
        dtype: torch.dtype,
        *,
        first: Mode = "full",
        may_cast: bool = True,
    ) -> Placement | Refusal:
        """Decide where a model's weights lie for a call of this size: ``first``, or a later one.

        Args:
            may_cast: weights may be held cast, where ``first`` is ``modulation``.
        """
        if first == "modulation" and not self._sizes_of(base_model, dtype).modulation_bytes:
            first = "full"  # It has none that could be shared.
        is_pipeline = plan.pipefusion > 1
        is_tensor = plan.tensor > 1
        cards = self._cards()
        if cards is None:
            # CPU ranks: ComfyUI counts no RAM, nor do we.
            mode: Mode = "tensor" if is_tensor else "staged" if is_pipeline else first
            return Placement(_residence(mode, plan), None)
        may_cast = may_cast and self._modes.get(base_model, "cast") == "cast"
        choice = self._choice(base_model, workload, plan, dtype, cards, first, may_cast=may_cast)
        if isinstance(choice, Refusal):
            return choice
        self.arithmetic = choice.lines()
        need = choice.needs[-1]
        room = max(0, need.card.free_bytes - need.num_bytes)
        needed = need.num_bytes - CUDA_CONTEXT_BYTES * (2 if need.card.has_host else 1)
        mode = choice.mode
        if not is_tensor:
            order = PIPELINE_MODES if is_pipeline else MODES
            before = self._modes.get(base_model, mode)
            mode = max(mode, before if before in order else mode, key=order.index)
            self._modes[base_model] = mode
        return Placement(_residence(mode, plan), room, needed, need.working_bytes)

    def is_resident(
        self, base_model: Any, workload: Workload, plan: ParallelPlan, dtype: torch.dtype
    ) -> bool:
        """Whether every rank has on its card all weights that it computes with under a plan."""
        if plan.tensor == 1 and self._modes.get(base_model, "full") not in ON_CARDS:
            return False
        cards = self._cards()
        if cards is None:
            return True
        choice = self._choice(base_model, workload, plan, dtype, cards)
        return not isinstance(choice, Refusal) and choice.is_on_cards

    def has_room_for_shares(
        self, base_model: Any, workload: Workload, plan: ParallelPlan, dtype: torch.dtype
    ) -> bool:
        """Whether weights lie where they would with even shares: on the cards if they can."""
        cards = self._cards()
        if cards is None:
            return True
        as_planned, as_even = (
            self._choice(base_model, workload, shared, dtype, cards)
            for shared in (plan, replace(plan, weights=()))
        )
        if isinstance(as_planned, Refusal) or isinstance(as_even, Refusal):
            return isinstance(as_even, Refusal)
        return as_planned.is_on_cards or as_planned.mode == as_even.mode

    def _choice(
        self,
        base_model: Any,
        workload: Workload,
        plan: ParallelPlan,
        dtype: torch.dtype,
        cards: tuple[Card, ...],
        first: Mode = "full",
        *,
        may_cast: bool = True,
    ) -> ResidencyPlan | Refusal:
        num_blocks = num_blocks_of(base_model)
        load = token_load(
            plan,
            workload,
            num_blocks=num_blocks,
            hidden_size=flux_of(base_model).hidden_size,
            bytes_per_value=dtype.itemsize,
        )
        sizes = self._sizes_of(base_model, dtype)
        return plan_residency(
            plan,
            sizes,
            load,
            num_blocks=num_blocks,
            cards=cards,
            first=first,
            may_cast=may_cast,
        )

    def _sizes_of(self, base_model: Any, dtype: torch.dtype) -> ModelSizes:
        if base_model not in self._sizes:
            self._sizes[base_model] = model_sizes(base_model, dtype)
        return self._sizes[base_model]

    def _cards(self) -> tuple[Card, ...] | None:
        ranks = self._joined
        if self._budget is not None:
            return tuple(Card(self._budget, self._budget, has_host=r.rank == 0) for r in ranks)
        if any(rank.total_bytes == 0 for rank in ranks):
            return None
        import comfy.model_management

        # --reserve-vram asks for more than the reserve that the plan has already.
        more = max(0, int(comfy.model_management.extra_reserved_memory()) - RESERVED_BYTES)
        # On the first card ComfyUI takes and frees memory meanwhile.
        of_group = max([r.group_bytes for r in ranks if r.rank > 0], default=0) or NCCL_GROUP_BYTES
        # What contexts and groups take, ComfyUI's among them, is not free any more; the plan counts
        # it again. Nothing but ComfyUI, which gives way, is taken to be on the first card.
        there = CUDA_CONTEXT_BYTES + of_group
        return tuple(
            Card(
                total_bytes=r.total_bytes,
                free_bytes=(r.total_bytes if r.rank == 0 else r.free_bytes + there) - more,
                has_host=r.rank == 0,
                group_bytes=of_group,
            )
            for r in ranks
        )


def _residence(mode: Mode, plan: ParallelPlan) -> Residence:
    if mode == "staged":
        return Residence(grid=plan.grid, weights=plan.weights)
    if mode == "tensor":
        return Residence(tensor_degree=plan.tensor)
    return Residence(mode)


def num_blocks_of(base_model: Any) -> int:
    """Double and single blocks of a model."""
    flux = flux_of(base_model)
    return len(flux.double_blocks) + len(flux.single_blocks)


def model_sizes(base_model: Any, dtype: torch.dtype) -> ModelSizes:
    """Count a model's weights as they are stored, in the dtype that ComfyUI computes with.

    Args:
        dtype: that the model computes in.
    """
    stored, as_cast = (_sizes(base_model, dtype, is_cast=is_cast) for is_cast in (False, True))
    has_casts = as_cast.total_bytes > stored.total_bytes and stored.modulation_bytes > 0
    return replace(stored, as_cast=as_cast if has_casts else None)


def _sizes(base_model: Any, dtype: torch.dtype, *, is_cast: bool) -> ModelSizes:
    """Count a model's weights as they are stored, or as they are once they are cast."""
    flux = flux_of(base_model)
    modules = {name.replace(COMPILED, ""): module for name, module in flux.named_modules()}
    blocks: dict[str, int] = {}
    outside = cast = modulation = 0
    can_share = True
    for weight in stored_weights(flux, base_model.current_patcher):
        num_bytes = weight.num_bytes
        # A quantised weight's shape is that of the matrix that it stands for.
        as_computed = weight.tensor.shape.numel() * dtype.itemsize
        if is_cast and can_cast_once(
            modules.get(weight.name.rpartition(".")[0]), weight.tensor, weight.dtype
        ):
            num_bytes = as_computed
        block = _BLOCK.match(weight.name)
        if block is None:
            outside += num_bytes
        else:
            blocks[block[1]] = blocks.get(block[1], 0) + num_bytes
        if num_bytes < as_computed:
            cast = max(cast, as_computed)
        shared = _MODULATION.match(weight.name)
        if shared is not None:
            modulation += num_bytes
            is_cut = shared[1] in ("weight", "bias")
            can_share &= can_cut(weight.tensor) if is_cut else weight.tensor.numel() == 1
    return ModelSizes(
        total_bytes=outside + sum(blocks.values()),
        largest_block_bytes=max(blocks.values(), default=0),
        outside_blocks_bytes=outside,
        cast_bytes=cast,
        modulation_bytes=modulation if can_share else 0,
    )

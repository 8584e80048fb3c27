"""The models that a rank holds, each in one state of its weights.

Runs in: worker process.

    file or packs --load--> stored weights --ComfyUI's patch lists--> weights in use

ComfyUI's own memory manager works in this process as it does in any: it moves a model to the
device, patches it, and makes room by taking another model off. A model that is taken off has its
weights in the mapped file again, and no copy of them in this process.
"""

from __future__ import annotations

import ctypes
import gc
import uuid
from typing import Any

import torch

from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.planning.pipeline import stage_blocks
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.fingerprint import PREFIX, Fingerprint, digests
from comfy_xdit_patch.wire.messages.requests import Load, Residence, Tree
from comfy_xdit_patch.wire.packs import PackMap
from comfy_xdit_patch.wire.plain_attributes import plain_attributes
from comfy_xdit_patch.wire.skeleton import build
from comfy_xdit_patch.wire.slots import SlotMap
from comfy_xdit_patch.wire.tensors import dtype_of
from comfy_xdit_patch.wire.weight_patches import decode
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.captured_forwards import CapturedForwards
from comfy_xdit_patch.worker.shard.quantised import scaled_layers
from comfy_xdit_patch.worker.weights.loading import load_patcher
from comfy_xdit_patch.worker.weights.overlay import Overlay
from comfy_xdit_patch.worker.weights.placing import (
    Progress,
    patches_computed_in,
    place_shared,
    place_tensor,
    place_whole,
)
from comfy_xdit_patch.worker.weights.resident import Resident
from comfy_xdit_patch.worker.weights.sharded_blocks import ShardedBlocks
from comfy_xdit_patch.worker.weights.shared_modulation import SharedModulation


class Residents:
    """All models of this rank, by number, in the order of their last use."""

    def __init__(self, slots: SlotMap, groups: Groups) -> None:
        self._packs = PackMap(slots.__getitem__)
        self._groups = groups
        self._models: dict[int, Resident] = {}
        self.captured = CapturedForwards(groups.device)
        """Graphs of forwards, which go whenever weights do."""

    @property
    def numbers(self) -> list[int]:
        return sorted(self._models)

    def take(self, message: Load, progress: Progress) -> tuple[Resident, bool]:
        """Hold a model in the state that the message asks for, on the device.

        Returns:
            The model, and whether it had to be loaded first.
        """
        self.captured.look_again()
        resident = self._models.get(message.model)
        is_new = resident is None
        try:
            if resident is None:
                resident = self._models[message.model] = self._load(message)
            # ComfyUI's books hold ModelPatchers weakly: the last one lives until the next is in.
            before = resident.current
            asked, had = message.residence, resident.residence
            stage = self._stage(asked, resident)
            is_same_stage = resident.staged.stage == stage
            is_same = (asked.mode, asked.tensor_degree) == (had.mode, had.tensor_degree)
            if not (is_same and is_same_stage) or resident.needs_other_patches(message.state):
                self.captured.drop()
                if had.is_cut or asked.is_cut or not is_same_stage:
                    resident.take_off()
                    resident.keep_stage(stage)
                resident.overlay.take_off(resident.current, restore=True)
                resident.current = self._patched(resident, message.state)
                resident.residence = asked
                resident.is_on_device = False
            if resident.key != message.key:
                resident.key, resident.state, resident.digests = message.key, message.state, {}
            if message.verify and not (resident.digests or resident.is_whole):
                resident.is_on_device = False  # Weights are digested before they are cut.
            self._make_room(resident, message.room_bytes)
            self._place(resident, verify=message.verify, progress=progress)
            del before
        except BaseException:
            # Drop a state that is half made: the next request begins with the file.
            self.drop([message.model])
            raise
        return resident, is_new

    def get(self, number: int) -> Resident | None:
        """Return a model, placed on the device, or None if this rank does not hold it."""
        resident = self._models.get(number)
        if resident is not None:
            try:
                self._place(resident, verify=False, progress=lambda _: None)
            except BaseException:
                self.drop([number])
                raise
        return resident

    def settle(self) -> None:
        """End the exchange that a call may have left under way when it raised. Collective."""
        for resident in self._models.values():
            if resident.blocks is not None:
                resident.blocks.settle()

    def give_way(self) -> None:
        """Give the device's memory back. Models return from the mapped files."""
        import comfy.model_management

        self.captured.drop()
        for resident in self._models.values():
            resident.take_off()
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()

    def drop(self, numbers: list[int] | None = None) -> None:
        """Forget models, all of them by default, and free their memory."""
        import comfy.model_management

        self.captured.drop()
        has_compiled = any(resident.compiled.is_in_use for resident in self._models.values())
        for number in self.numbers if numbers is None else numbers:
            resident = self._models.pop(number, None)
            if resident is not None:
                resident.take_off()
                del resident
        if has_compiled and not any(model.compiled.is_in_use for model in self._models.values()):
            torch.compiler.reset()  # What is compiled is the code's, and outlives every model.
        if not self._models:
            comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()
        # The C library keeps freed memory for later: give that back too.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def _make_room(self, resident: Resident, room_bytes: int | None) -> None:
        """Take models off, the one used longest ago first, until the rest fit beside this model."""
        others = [other for other in self._models.values() if other is not resident]
        size = sum(other.bytes_held for other in others if other.is_on_device)
        for other in others:
            if room_bytes is None or size <= room_bytes:
                return
            if other.is_on_device:
                self.captured.drop()
                size -= other.bytes_held
                other.take_off()

    def _place(self, resident: Resident, *, verify: bool, progress: Progress) -> None:
        number = next(n for n, other in self._models.items() if other is resident)
        self._models[number] = self._models.pop(number)  # used last
        if not resident.is_on_device:
            self.captured.drop()  # Room for weights, and they may be patched anew.
            dtype = resident.state.get("weight_patch_dtype")
            with patches_computed_in(None if dtype is None else dtype_of(dtype)):
                self._place_patched(resident, verify=verify, progress=progress)
        resident.lay_over(self._packs.tensor, progress)
        if verify and not resident.digests:
            resident.digests = digests(resident.flux)

    def _place_patched(self, resident: Resident, *, verify: bool, progress: Progress) -> None:
        residence = resident.residence
        if residence.mode == "sharded":
            resident.take_off()
            resident.blocks = place_shared(
                resident.current,
                ShardedBlocks,
                group=self._groups.weights,
                index=self._groups.rank,
                world_size=self._groups.world_size,
                digests=resident.digests if verify else None,
                progress=progress,
            )
        elif residence.shares_modulation:
            resident.take_off()
            group = self._groups.everyone
            assert group is not None, "a world of one rank shares nothing"
            resident.modulation = place_shared(
                resident.current,
                SharedModulation,
                group=group,
                index=self._groups.rank,
                world_size=self._groups.world_size,
                digests=resident.digests if verify else None,
                is_cast=residence.mode == "cast",
                progress=progress,
            )
        elif residence.tensor_degree > 1:
            resident.take_off()
            resident.tensor = place_tensor(
                resident.current,
                index=self._groups.rank % residence.tensor_degree,
                degree=residence.tensor_degree,
                digests=resident.digests if verify else None,
                progress=progress,
            )
        else:
            is_complete = residence.mode == "full"
            place_whole(resident.current, is_complete=is_complete, progress=progress)
        resident.is_on_device = True
        for other in self._models.values():
            if other is not resident and other.is_whole and other.is_on_device:
                other.follow_comfyui()

    def _stage(self, residence: Residence, resident: Resident) -> range | None:
        """Return the blocks that this rank is to have, None for all."""
        if not residence.grid:
            return None
        plan = ParallelPlan.of_grid(residence.grid, residence.weights)
        num_blocks = sum(len(getattr(resident.flux, name)) for name in BLOCK_LISTS)
        return stage_blocks(plan, self._groups.rank, num_blocks)

    def _patched(self, resident: Resident, state: Tree) -> Any:
        """Return a clone of the ModelPatcher with the patches of a state, or itself for none."""
        patcher = resident.patcher
        dtype = state["manual_cast_dtype"]
        if not (state["patches"] or state["force_cast_weights"] or dtype is not None):
            return patcher
        current = patcher.clone()
        current.patches = resident.staged.cut(decode(state["patches"], self._packs.tensor))
        current.patches_uuid = uuid.uuid4()
        current.force_cast_weights = state["force_cast_weights"]
        if dtype is not None:
            current.add_object_patch("manual_cast_dtype", dtype_of(dtype))
        return current

    def _load(self, message: Load) -> Resident:
        if message.source is not None:
            patcher = load_patcher(message.source)
        else:
            patcher = build(message.tensors, self._packs.tensor)
        model = patcher.model
        # As ComfyUI leaves what it patches: a graph is compiled for weights that are so, or not.
        model.diffusion_model.requires_grad_(False)
        name = Fingerprint(model.diffusion_model, manual_cast_dtype=model.manual_cast_dtype)
        stored = {PREFIX + key: value for key, value in model.diffusion_model.named_parameters()}
        return Resident(
            patcher,
            name,
            stored,
            patcher,
            scaled_layers(model.diffusion_model),
            Overlay(self._groups.world_size),
            plain_attributes(model.diffusion_model),
        )

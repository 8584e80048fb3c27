"""One model that a rank holds, in one state of its weights.

Runs in: worker process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal, WorkerError
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.fingerprint import Fingerprint, stored_weights
from comfy_xdit_patch.wire.messages.requests import Forward, Residence, Tree
from comfy_xdit_patch.wire.plain_attributes import Attributes
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.compiled_blocks import CompiledBlocks
from comfy_xdit_patch.worker.shard.later_columns import PLAIN, LaterColumns
from comfy_xdit_patch.worker.shard.node_patches import ModelPatches
from comfy_xdit_patch.worker.weights.overlay import Overlay
from comfy_xdit_patch.worker.weights.sharded_blocks import ShardedBlocks
from comfy_xdit_patch.worker.weights.shared_modulation import SharedModulation
from comfy_xdit_patch.worker.weights.stage_blocks import StagedBlocks
from comfy_xdit_patch.worker.weights.tensor_blocks import TensorBlocks

COMPILE = {f"TensorCore{kind}Layout" for kind in ("FP8", "FP8E4M3", "FP8E5M2", "MXFP8")}
"""Layouts of ComfyUI's quantised tensors whose layers compile: none looks at other tokens."""


@dataclass(slots=True)
class Resident:
    """One model.

    ``fingerprint`` and ``stored`` keep its weights as they are stored, in the file's own pages.
    ``patcher`` is ComfyUI's for the weights as they are stored, ``current`` its clone with the
    patches of ``state``, whose contents ``key`` names; ``overlay`` has what lies over those.
    ``attributes`` are the plain ones of its modules, as ComfyUI made them.
    ``blocks`` are this rank's weight shards, where it has some, ``tensor`` its heads and columns,
    where blocks are cut by those, and ``modulation`` its part of that, where only that is cut.
    ``compiled`` are its blocks as the user's graph has them compiled.
    ``is_on_device`` says that the weights in use are on the device.
    """

    patcher: Any
    fingerprint: Fingerprint
    stored: dict[str, torch.Tensor]
    current: Any
    scaled: dict[str, Any]
    overlay: Overlay
    attributes: Attributes
    state: dict[str, Tree] = field(default_factory=dict)
    key: str = ""
    residence: Residence = field(default_factory=Residence)
    blocks: ShardedBlocks | None = None
    tensor: TensorBlocks | None = None
    modulation: SharedModulation | None = None
    compiled: CompiledBlocks = field(default_factory=CompiledBlocks)
    is_on_device: bool = False
    digests: dict[str, str] = field(default_factory=dict)
    staged: StagedBlocks = field(init=False)
    """Which blocks are in place: those of this rank's stage, or all."""
    later: LaterColumns = field(init=False)

    is_quantised: bool = field(init=False)
    """Whether weights are stored in tensor classes of their own, and not in such as compile."""

    def __post_init__(self) -> None:
        self.staged = StagedBlocks(self.flux)
        self.is_quantised = any(
            type(weight) not in PLAIN and getattr(weight, "_layout_cls", "") not in COMPILE
            for weight in self.stored.values()
        )
        self.later = LaterColumns(self.flux)

    @property
    def flux(self) -> Any:
        """ComfyUI's ``Flux`` module."""
        return self.patcher.model.diffusion_model

    @property
    def is_whole(self) -> bool:
        """Whether ComfyUI's memory manager has placed the model, and may take it off the device."""
        return self.blocks is None and self.tensor is None and self.modulation is None

    @property
    def bytes_held(self) -> int:
        """Bytes of the weights that this rank uses, shards counted as what they are."""
        shards = 0 if self.blocks is None else self.blocks.bytes_held
        return (
            shards
            + self.overlay.bytes_held(self.current)
            + sum(weight.num_bytes for weight in stored_weights(self.flux))
        )

    @property
    def bytes_moved(self) -> int:
        """Bytes that this rank exchanged so far because its blocks are not whole."""
        sharded = 0 if self.blocks is None else self.blocks.bytes_gathered
        return sharded + sum(
            0 if cut is None else cut.bytes_sent for cut in (self.tensor, self.modulation)
        )

    @property
    def scaled_in_place(self) -> dict[str, Any]:
        """Old scaled fp8 layers that have their scale before the call begins.

        A shard's layers get theirs only when their block begins; where a scale goes is a matter of
        rounding.
        """
        return self.scaled if self.blocks is None and self.tensor is None else {}

    def begin(
        self, plan: ParallelPlan, groups: Groups, *, num_rows: int, is_driven: bool = False
    ) -> int:
        """Make the model ready for a call; return how many bytes its weights have moved so far.

        Args:
            num_rows: of the whole batch.
            is_driven: the host runs the model's blocks one by one.

        Raises:
            WorkerError: its blocks are cut for another plan.
        """
        degree = 1 if self.tensor is None else self.tensor.degree
        if degree != plan.tensor:
            raise WorkerError(f"The blocks are cut in {degree} and {plan.name} is asked for.")
        if self.tensor is not None:
            self.tensor.begin(groups.of_plan(plan).tensor)
        if self.modulation is not None:
            self.modulation.begin(plan, num_rows=num_rows, is_driven=is_driven)
        return self.bytes_moved

    def why_uncompiled(self, patches: ModelPatches | None) -> Refusal | None:
        """Say what keeps its blocks from running compiled in a call with these patches of nodes."""
        held = self.residence
        if held.tensor_degree > 1 or held.grid or held.mode == "offload":
            return Refusal("blocks are cut, staged or in CPU memory")
        if self.scaled or self.overlay.has_bypass:
            return Refusal("layers of the model are changed for each call")
        if patches is not None and patches.are_in_blocks:
            return Refusal("a node's patch runs inside of the blocks")
        if self.is_quantised:
            return Refusal("the model's weights are quantised")
        return None

    @property
    def enter(self) -> Callable[[str, torch.Tensor], list[torch.Tensor]] | None:
        """What gathers for a block that runs compiled what its weights are not here for."""
        return None if self.modulation is None else self.modulation.of_block

    def why_uncaptured(
        self, message: Forward, patches: ModelPatches | None, device: torch.device
    ) -> Refusal | None:
        """Say what keeps a call from being a CUDA graph. All ranks have the same answer."""
        import comfy.cli_args

        if device.type != "cuda":
            return Refusal("ranks on CPUs have no CUDA graphs")
        if getattr(comfy.cli_args.args, "disable_cuda_graphs", False):
            return Refusal("ComfyUI was started with --disable-cuda-graphs")
        residence = self.residence
        has_all = residence.shares_modulation or (residence.mode == "full" and not residence.grid)
        if not has_all or message.pipeline is not None:
            return Refusal("not all weights lie on the card")
        if self.scaled or self.overlay.has_bypass or self.state.get("hooks") is not None:
            return Refusal("layers of the model are changed for each call")
        if patches is not None:
            return Refusal("a node's patch takes part in the call")
        if message.compiled is not None:
            return Refusal("its blocks are compiled")
        return None

    def needs_other_patches(self, state: dict[str, Tree]) -> bool:
        """Whether a state differs in more than what lies over the patched weights."""
        names = ("patches", "manual_cast_dtype", "weight_patch_dtype", "force_cast_weights")
        return any(self.state.get(name) != state[name] for name in names) or not self.state

    def lay_over(
        self, tensor: Callable[[Tree], torch.Tensor], progress: Callable[[float], None]
    ) -> None:
        """Have what the state asks for lie over the patched weights."""
        self.overlay.apply(
            self.current, self.state, stored=self.stored, tensor=tensor, progress=progress
        )

    def keep_stage(self, stage: range | None) -> None:
        """Have the blocks of a stage only, or all for None; the model must be off the device."""
        self.staged.keep(stage)
        self.patcher.size = 0  # ComfyUI counts it once and clones the count.

    def take_off(self) -> None:
        """Take the model off the device: its weights are the file's again, and nothing is moved."""
        self.is_on_device = False
        self.overlay.take_off(self.current, restore=False)
        if self.blocks is not None:
            self.blocks.release(restore=False)
            self.blocks = None
        if self.tensor is not None:
            self.tensor.release()
            self.tensor = None
        if self.modulation is not None:
            self.modulation.release()
            self.modulation = None
        self._to_file()
        self.current.detach()

    def follow_comfyui(self) -> None:
        """See whether ComfyUI took the model off the device, in whole or in part, for another."""
        model = self.patcher.model
        if model.current_weight_patches_uuid is None:
            self.is_on_device = False
            self.overlay.take_off(self.current, restore=False)
            self._to_file()
        elif model.model_lowvram and self.residence.mode == "full":
            self.is_on_device = False
            self.overlay.take_off(self.current, restore=True)

    def _to_file(self) -> None:
        """Put the stored weights in the place of those on the device, and so free these."""
        import comfy.utils

        for key in self.staged.in_place(self.stored):
            comfy.utils.set_attr_param(self.patcher.model, key, self.stored[key])

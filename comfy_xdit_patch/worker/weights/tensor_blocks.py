"""Tensor parallelism inside of every block: this rank's heads, and its columns of the MLP.

Runs in: worker process.

ComfyUI's blocks run as they are, on linears that have fewer features and with attributes that say
so. A rank holds its part of a weight and nothing of the others' (``planning/tensor_cuts.py`` says
which), in the format in which ComfyUI stores it, so that ComfyUI's own casts, scales and kernels
work on it as on any weight. Two things happen to what a linear returns, in forward hooks:

    summed      linears that sum over what was cut: all-reduce. The first rank's has the bias.
    gathered    modulation: all-gather
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.sequence_shares import shard_sizes
from comfy_xdit_patch.planning.tensor_cuts import BlockCuts, Cut, cuts_of
from comfy_xdit_patch.wire.tensors import as_parameter, cut_to
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.shard.rank_tokens import gather_sequence
from comfy_xdit_patch.worker.weights.sharded_blocks import Bake


class TensorBlocks:
    """The blocks of one model, cut for one rank.

    Args:
        flux: ComfyUI's ``Flux``, or ``ControlNetFlux``, its weights in (mapped) CPU memory.
        index: this rank's place in its tensor group, which has ``degree`` ranks.
        bake: called with each whole weight on the device before it is cut, e.g. to apply weight
            patches.

    Collective:
        Every forward of a block, for the ranks of a tensor group.
    """

    def __init__(
        self, flux: Any, *, index: int, degree: int, device: torch.device, bake: Bake
    ) -> None:
        self.degree = degree
        self.bytes_sent = 0
        """What this rank sent to others, by the formula of a ring all-reduce and all-gather."""
        self._index = index
        self._device = device
        self._group: dist.ProcessGroup | None = None
        self._hooks: list[Any] = []
        self._whole: list[tuple[Any, str, Any]] = []
        for cuts in list(cuts_of(flux, degree)):
            self._cut(flux.get_submodule(cuts.name), cuts, bake)

    def begin(self, group: dist.ProcessGroup | None) -> None:
        """Say which ranks the next forwards are shared with."""
        self._group = group

    def release(self) -> None:
        """Undo what was changed in ComfyUI's blocks. The caller puts their weights back."""
        for hook in self._hooks:
            hook.remove()
        for owner, name, value in self._whole:
            setattr(owner, name, value)
        self._hooks.clear()
        self._whole.clear()

    def _cut(self, block: Any, cuts: BlockCuts, bake: Bake) -> None:
        by_linear = {cut.linear: cut for cut in cuts.cuts}
        for module_name, module in block.named_modules():
            cut = by_linear.get(module_name)
            for name, tensor in list(module._parameters.items()):
                if tensor is None:
                    continue
                whole_name = ".".join(filter(None, (cuts.name, module_name, name)))
                whole = bake(whole_name, tensor.to(self._device))
                module._parameters[name] = self._part(cut, name, whole)
            if cut is not None and cut.result == "summed":
                self._hooks.append(module.register_forward_hook(self._summed))
            if cut is not None and cut.result == "gathered":
                sizes = cut.sizes(self.degree)
                self._hooks.append(module.register_forward_hook(partial(self._gathered, sizes)))
        for name, size in cuts.sizes(self._index, self.degree).items():
            if hasattr(block, name):
                self._whole.append((block, name, getattr(block, name)))
                setattr(block, name, size)

    def _part(self, cut: Cut | None, name: str, whole: torch.Tensor) -> torch.Tensor | None:
        """This rank's part of one parameter of a linear; what is no weight or bias is small."""
        if cut is None or name not in ("weight", "bias"):
            return as_parameter(whole)
        if name == "bias" and cut.result == "summed":
            return as_parameter(whole) if self._index == 0 else None
        return as_parameter(cut_to(whole, cut.dim, cut.ranges(self._index, self.degree)))

    def _summed(self, _: Any, __: Any, part: torch.Tensor) -> torch.Tensor:
        assert self._group is not None, "a forward begins with its group"
        data = part.contiguous()
        collectives.all_reduce_sum(data, group=self._group)
        # A ring sends every piece but one in either of its two rounds.
        own = shard_sizes(data.numel(), self.degree)[self._index]
        self.bytes_sent += 2 * (data.numel() - own) * data.element_size()
        return data

    def _gathered(
        self, sizes: tuple[int, ...], _: Any, __: Any, part_BTD: torch.Tensor
    ) -> torch.Tensor:
        assert self._group is not None, "a forward begins with its group"
        joined_BDT = gather_sequence(part_BTD.transpose(1, 2), sizes=sizes, group=self._group)
        rows = part_BTD[..., 0].numel()
        self.bytes_sent += max(sizes) * rows * part_BTD.element_size() * (self.degree - 1)
        return joined_BDT.transpose(1, 2).contiguous()

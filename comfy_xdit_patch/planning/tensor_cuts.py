"""Tensor parallelism: how the linears of every block are cut among the ranks of a tensor group.

Runs in: host and worker. Reads ComfyUI's modules, changes nothing. No torch, no ComfyUI.

Megatron's cut: a rank has some heads and some columns of the MLP, from the linear that makes them
to the linear that sums over them. What is fused in one weight is cut part by part.

    double block   attn.qkv    [q | k | v]               outputs, every part alike
                   attn.proj   [heads]                   inputs; the ranks' results are summed
                   mlp         [up], [gate | up]         outputs, every part alike
                               [columns]                 inputs; summed
    single block   linear1     [q | k | v | mlp...]      outputs, every part alike
                   linear2     [heads | columns]         inputs; summed
    both           modulation  [any]                     outputs, which the ranks gather

``modulation`` serves one row for each image and not tokens: it is cut for its memory (a quarter of
FLUX.1's weights), and what is gathered is small.

Source: Megatron-LM, arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.planning.sequence_shares import bounds, shard_sizes

LARGEST_UNIT = 64
"""Columns are cut in multiples of it where they divide: matrix kernels want multiples."""

Result = Literal["local", "summed", "gathered"]


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring features, which are shared in units that stay whole: a head, some columns."""

    num_units: int
    width: int

    def range(self, index: int, degree: int) -> tuple[int, int]:
        """First and end feature of one rank."""
        first, end = bounds(shard_sizes(self.num_units, degree))[index]
        return first * self.width, end * self.width


@dataclass(frozen=True, slots=True)
class Cut:
    """One linear of a block.

    ``dim`` of its weight is cut: 0 its outputs, 1 its inputs. ``result`` says what becomes of what
    a rank computes: it stays, is summed over the ranks, or gathered from them.
    """

    linear: str
    dim: int
    parts: tuple[Part, ...]
    result: Result

    def ranges(self, index: int, degree: int) -> tuple[tuple[int, int], ...]:
        """First and end feature of each part of one rank, in the whole weight."""
        found, offset = [], 0
        for part in self.parts:
            first, end = part.range(index, degree)
            found.append((offset + first, offset + end))
            offset += part.num_units * part.width
        return tuple(found)

    def sizes(self, degree: int) -> tuple[int, ...]:
        """Features of every rank."""
        return tuple(
            sum(end - first for first, end in self.ranges(index, degree)) for index in range(degree)
        )


@dataclass(frozen=True, slots=True)
class BlockCuts:
    """One block: its linears, and what ComfyUI's forward takes its shapes from."""

    name: str
    cuts: tuple[Cut, ...]
    heads: Part
    columns: Part
    num_pieces: int
    """How many parts of its first linear make one column: 2 where one of them is a gate."""

    def sizes(self, index: int, degree: int) -> dict[str, int]:
        """Attributes of the block as they are for one rank's heads and columns."""
        first, end = self.heads.range(index, degree)
        left, right = self.columns.range(index, degree)
        return {
            "num_heads": (end - first) // self.heads.width,
            "hidden_size": end - first,
            "mlp_hidden_dim": right - left,
            "mlp_hidden_dim_first": (right - left) * self.num_pieces,
        }


def cuts_of(flux: Any, degree: int) -> Iterator[BlockCuts]:
    """Say how each block of a model, or of a ControlNet, is cut into ``degree`` parts."""
    for block_list in BLOCK_LISTS:
        for number, block in enumerate(getattr(flux, block_list)):
            cut = _double if block_list == "double_blocks" else _single
            yield cut(f"{block_list}.{number}", block, degree)


def modulation_cuts(flux: Any, degree: int) -> dict[str, Cut]:
    """Say how the linears of the blocks' modulation are cut; none where blocks have none.

    Returns:
        The cuts by the linear's name in the model, in the order in which blocks run.
    """
    return {
        f"{block.name}.{cut.linear}": cut
        for block in cuts_of(flux, degree)
        for cut in block.cuts
        if cut.result == "gathered"
    }


def _double(name: str, block: Any, degree: int) -> BlockCuts:
    heads = Part(block.num_heads, block.hidden_size // block.num_heads)
    cuts = []
    for stream in ("img", "txt"):
        mlp = getattr(block, f"{stream}_mlp")
        if hasattr(mlp, "down_proj"):  # YakMLP: gate and up are linears of their own
            ins, out = ["gate_proj", "up_proj"], "down_proj"
        else:
            ins, out = ["0"], "2"
        columns = _columns(getattr(mlp, out).weight.shape[1], degree)
        num_outputs = sum(getattr(mlp, linear).weight.shape[0] for linear in ins)
        num_pieces = num_outputs // (columns.num_units * columns.width)
        cuts += [
            Cut(f"{stream}_attn.qkv", 0, (heads,) * 3, "local"),
            Cut(f"{stream}_attn.proj", 1, (heads,), "summed"),
            *(
                Cut(f"{stream}_mlp.{linear}", 0, (columns,) * (num_pieces // len(ins)), "local")
                for linear in ins
            ),
            Cut(f"{stream}_mlp.{out}", 1, (columns,), "summed"),
        ]
        if block.modulation:
            cuts.append(_modulation(f"{stream}_mod", getattr(block, f"{stream}_mod"), degree))
    return BlockCuts(name, tuple(cuts), heads, columns, num_pieces)


def _single(name: str, block: Any, degree: int) -> BlockCuts:
    heads = Part(block.num_heads, block.hidden_size // block.num_heads)
    columns = _columns(block.mlp_hidden_dim, degree)
    num_pieces = block.mlp_hidden_dim_first // block.mlp_hidden_dim
    cuts = [
        Cut("linear1", 0, (*(heads,) * 3, *(columns,) * num_pieces), "local"),
        Cut("linear2", 1, (heads, columns), "summed"),
    ]
    if block.modulation is not None:
        cuts.append(_modulation("modulation", block.modulation, degree))
    return BlockCuts(name, tuple(cuts), heads, columns, num_pieces)


def _modulation(name: str, module: Any, degree: int) -> Cut:
    return Cut(f"{name}.lin", 0, (_columns(module.lin.weight.shape[0], degree),), "gathered")


def _columns(num_features: int, degree: int) -> Part:
    unit = LARGEST_UNIT
    while unit > 1 and (num_features % unit or num_features // unit < degree):
        unit //= 2
    return Part(num_features // unit, unit)

"""Single blocks on this rank's shard, for a forward that runs in the host.

Runs in: worker process.

The host runs ``forward_orig``, ComfyUI's or a node's, and asks for one block at a time. Tokens stay
on the ranks from one block to the next, under numbers, until the host wants to see them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import SEQUENCE_DIM, SequenceShares
from comfy_xdit_patch.wire.recipes import follow
from comfy_xdit_patch.worker.attention.attention import SequenceAttention
from comfy_xdit_patch.worker.attention.prescribed import attention_of_blocks
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.node_patches import ModelPatches
from comfy_xdit_patch.worker.shard.quantised import (
    ScaledLayers,
    scales_on_weights,
    whole_input_scales,
)
from comfy_xdit_patch.worker.shard.rank_tokens import RankTokens
from comfy_xdit_patch.worker.shard.sequence import REFERENCES, stream_counts

STREAM_OF = {"img": "image", "txt": "text", "x": "joint"}
"""Arguments of blocks that are tokens."""
RANGES_OF = {
    "modulation_dims_img": "image",
    "modulation_dims_txt": "text",
    "modulation_dims": "joint",
}
POSITIONS_DIM = 2  # pe is (B, 1, S, ...)


class DrivenBlocks:
    """Runs blocks, and keeps what they return."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._kept: dict[int, torch.Tensor] = {}

    def run(
        self,
        block: Any,
        arguments: Mapping[str, Any],
        *,
        plan: ParallelPlan,
        shares: SequenceShares,
        scaled: ScaledLayers,
        patches: ModelPatches | None,
        keep: list[int],
    ) -> tuple[list[torch.Tensor], int]:
        """Run one block on this rank's tokens, together with all others.

        Args:
            arguments: those of the block's ``forward``. Tokens are ["whole", tensor], or recipes
                of tokens that the ranks keep.
            keep: numbers for the tensors that it returns.

        Returns:
            What it returned, and the bytes this rank sent to others.
        """
        of_plan, index = self._groups.of_plan(plan), self._groups.rank
        assert of_plan.sequence is not None
        mine = RankTokens(shares, index, of_plan.sequence)
        attention = SequenceAttention(
            shares=shares,
            index=index,
            groups=of_plan,
            function=None if patches is None else patches.attention,
            wants_order=patches is not None and patches.wants_order,
        )
        values = {name: self._own(name, value, mine) for name, value in arguments.items()}
        values["transformer_options"] = {
            **({} if patches is None else patches.options(mine)),
            "img_slice": [shares.text[index], shares.joint[index]],
            REFERENCES: [shares.reference[index]] if shares.reference[index] else [],
            "optimized_attention_override": attention,
        }
        with ExitStack() as stack:
            stack.enter_context(whole_input_scales())
            stack.enter_context(attention_of_blocks())
            rows = next(values[n].shape[0] for n in STREAM_OF if n in values)
            counted = stream_counts(shares, index, rows=rows, num_rows=rows)
            stack.enter_context(scales_on_weights(scaled, **counted))
            accepted = inspect.signature(block.forward).parameters
            out = block(**{name: value for name, value in values.items() if name in accepted})
        results = list(out) if isinstance(out, tuple) else [out]
        self._kept.update(zip(keep, results, strict=True))
        return results, attention.bytes_sent + mine.bytes_sent

    def fetch(self, recipe: Any, stream: str, shares: SequenceShares) -> tuple[torch.Tensor, int]:
        """Return all tokens of a recipe, in ComfyUI's order. Collective."""
        world_size = self._groups.world_size
        group = self._groups.of_plan(ParallelPlan(ulysses=world_size)).sequence
        assert group is not None
        mine = RankTokens(shares, self._groups.rank, group)
        tokens = mine.gather(self._follow(recipe, shares), stream)
        return tokens, mine.bytes_sent

    def forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._kept.pop(number, None)

    def _own(self, name: str, value: Any, mine: RankTokens) -> Any:
        if value is None:
            return None
        if name in STREAM_OF:
            if value[0] == "whole":
                return mine.own(value[1], STREAM_OF[name])
            # A block changes its tokens in place; other recipes may refer to these tokens.
            return self._follow(value, mine.shares).clone()
        if name == "pe":
            return mine.own(value, dim=POSITIONS_DIM)
        if name in RANGES_OF:
            return mine.ranges(value, RANGES_OF[name])
        return value

    def _follow(self, recipe: Any, shares: SequenceShares) -> torch.Tensor:
        num_text = shares.text[self._groups.rank]

        def step(kind: str, *parts: torch.Tensor) -> torch.Tensor:
            return torch.cat(parts, SEQUENCE_DIM) if kind == "join" else parts[0][:, num_text:]

        tokens: torch.Tensor = follow(recipe, {"kept": self._kept.__getitem__}, step)
        return tokens

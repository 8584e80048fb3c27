"""A ControlNet's residuals on this rank: kept where they were computed, used where they are kept.

Runs in: worker process.

The host holds a recipe for each residual instead of its numbers (``host/step/residuals_there.py``):
which tensor of which ControlNet call, and what ComfyUI did to it since (strength, sums of several
ControlNets). The recipe (``wire/recipes.py``) is followed here on this rank's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.sequence_shares import SequenceShares
from comfy_xdit_patch.wire.recipes import Leaves, arithmetic, follow, written
from comfy_xdit_patch.worker.shard.rank_tokens import RankTokens, gather_sequence


@dataclass(frozen=True, slots=True)
class ResidualSet:
    """What one call of a ControlNet left on this rank.

    ``image`` are the image tokens of every rank in the sequence group; a rank's tensors are
    (rows, tokens, features), of its own tokens.
    """

    image: tuple[int, ...]
    tensors: list[torch.Tensor]


class Residuals:
    """All residuals that this rank keeps, by the number of the ControlNet's call."""

    def __init__(self) -> None:
        self._sets: dict[int, ResidualSet] = {}

    def keep(self, call: int, residuals: ResidualSet) -> None:
        self._sets[call] = residuals

    def forget(self, calls: list[int]) -> None:
        for call in calls:
            self._sets.pop(call, None)

    def numbered(self, control: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """Number the calls that recipes refer to from 0: their own numbers are others each step.

        Returns:
            The recipes, and what these calls left: shares of image tokens, and tensors.
        """
        numbers: dict[int, int] = {}

        def residual(call: int, index: int) -> list[Any]:
            return ["residual", numbers.setdefault(call, len(numbers)), index]

        leaves: Leaves = {"residual": residual, "tensor": lambda whole: ["tensor", whole]}
        unique = [follow(recipe, leaves, written) for recipe in control["unique"]]
        kept = [(self._sets[call].image, self._sets[call].tensors) for call in numbers]
        return {**control, "unique": unique}, kept

    @classmethod
    def of(cls, kept: Sequence[Any]) -> Residuals:
        """Return what ``numbered`` recipes refer to."""
        residuals = cls()
        for number, (image, tensors) in enumerate(kept):
            residuals.keep(number, ResidualSet(image, tensors))
        return residuals

    def whole(self, control: Mapping[str, Any]) -> dict[str, Any]:
        """Follows recipes on a rank that has all tokens of its rows."""
        return _follow(control, lambda call, i: self._sets[call].tensors[i], lambda whole: whole)

    def cut(self, control: Mapping[str, Any], *, mine: RankTokens) -> dict[str, Any]:
        """Follows recipes on any part of the tokens, where every residual came whole."""

        def residual(call: int, index: int) -> torch.Tensor:
            raise ValueError(f"Residual {index} of call {call} is not whole on this rank.")

        return _follow(control, residual, lambda whole: mine.own(whole, "image"))

    def own(
        self,
        control: Mapping[str, Any],
        *,
        shares: SequenceShares,
        mine: RankTokens,
        group: dist.ProcessGroup,
    ) -> dict[str, Any]:
        """Follow recipes on this rank's tokens.

        Args:
            control: ``unique`` recipes, and for each of ComfyUI's lists of ``blocks`` which one of
                them a block takes, or None.

        Collective:
            Where the ControlNet's call was shared otherwise than this one (it does not see
            reference tokens), its residuals are gathered and cut anew.
        """

        def residual(call: int, index: int) -> torch.Tensor:
            kept = self._sets[call]
            if kept.image == shares.image:
                return kept.tensors[index]
            whole = gather_sequence(kept.tensors[index], sizes=kept.image, group=group)
            return mine.own(whole, "image")

        return _follow(control, residual, lambda whole: mine.own(whole, "image"))


def _follow(
    control: Mapping[str, Any],
    residual: Callable[[int, int], torch.Tensor],
    cut: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    leaves: Leaves = {"residual": residual, "tensor": cut}
    unique = [follow(recipe, leaves, arithmetic) for recipe in control["unique"]]
    return {
        name: [None if i is None else unique[i] for i in blocks]
        for name, blocks in control["blocks"].items()
    }

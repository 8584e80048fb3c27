"""What ComfyUI holds of a model, to compare it with what the workers hold.

Runs in: host process. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.reading.eligibility import blocking, without_index
from comfy_xdit_patch.host.reading.models import flux_of
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.fingerprint import (
    BLOCKS,
    Fingerprint,
    Look,
    agree,
    digests,
    is_dynamic,
    stored_weights,
)
from comfy_xdit_patch.wire.messages.replies import Loaded
from comfy_xdit_patch.wire.plain_attributes import Attributes, changed, plain_attributes

CHEAP_BYTES = 128 << 20
"""So much is read whole in every comparison: a core takes a tenth of a second."""


class Comparisons:
    """How closely the ranks' stored weights were compared with ComfyUI's, by a model's number."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._seeds = itertools.count(1)
        self._versions: dict[int, list[int]] = {}
        self._built: dict[int, Attributes] = {}

    def begin(self, base_model: Any, number: int) -> Comparison:
        """Decide how closely to look: whole at first, and where something was written to since.

        Raises:
            ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
        """
        patcher = base_model.current_patcher
        cast = "manual_cast_dtype"
        mine = Fingerprint(
            flux_of(base_model),
            manual_cast_dtype=patcher.object_patches_backup.get(cast, getattr(base_model, cast)),
            patcher=patcher,
        )
        # A dynamic host has not read its file, and need not have room for it in memory.
        is_doubtful = self._versions.get(number) != mine.versions and not is_dynamic(patcher)
        is_whole = is_doubtful or mine.bytes_of_cpu <= CHEAP_BYTES
        return Comparison(mine, next(self._seeds), self._world_size, is_whole=is_whole)

    def not_as_built(
        self, base_model: Any, number: int, attributes: Attributes | None
    ) -> Refusal | None:
        """Note what the ranks' modules were built with, if they are new, and compare it."""
        if attributes is None:
            return None
        self._built[number] = attributes
        changes = self.changed_attributes(base_model, number)
        return blocking(changes) or next(iter(changes), None)

    def changed_attributes(self, base_model: Any, number: int) -> list[Refusal]:
        """See which numbers and texts of its modules somebody set. None if no rank has it yet."""
        if number not in self._built:
            return []
        found = [
            Refusal(
                f"a node set {without_index(f'{module}.{name}').strip('.')} of this model",
                is_around_blocks=not module.startswith(BLOCKS),
            )
            for module, name in changed(self._built[number], plain_attributes(flux_of(base_model)))
        ]
        return list(dict.fromkeys(found))  # once for all blocks

    def ended_well(self, number: int, comparison: Comparison) -> None:
        """Note that the ranks hold what ComfyUI does."""
        self._versions[number] = comparison.versions


class Comparison:
    """One look at ComfyUI's stored weights, taken while the ranks look at theirs."""

    def __init__(
        self, mine: Fingerprint, seed: int, world_size: int, *, is_whole: bool = True
    ) -> None:
        self._mine = mine
        self._world_size = world_size
        self._expected: list[str] = []
        self.versions = mine.versions
        self.look = [seed, world_size if is_whole else 0]

    def make(self) -> None:
        """Look."""
        seed, parts = self.look
        ranks = range(self._world_size)
        self._expected = [self._mine.of(Look(seed, parts, rank)) for rank in ranks]

    def agrees(self, replies: Sequence[Loaded], *, only_blocks: bool) -> bool:
        """Whether the ranks, in their order, have found the same model, or the same blocks."""
        return all(
            agree(reply.fingerprint, mine, only_blocks=only_blocks)
            for reply, mine in zip(replies, self._expected, strict=True)
        )


def uncast(base_model: Any) -> list[str]:
    """Name the weights that workers must leave in the dtype of the file, as ComfyUI does here."""
    weights = stored_weights(flux_of(base_model), base_model.current_patcher)
    return [weight.name for weight in weights if weight.is_left_uncast]


def is_patched_here(patcher: Any) -> bool:
    """Whether ComfyUI has applied all patches to the weights that this process holds."""
    return (
        not is_dynamic(patcher)
        and not patcher.model.model_lowvram
        and patcher.model.current_weight_patches_uuid == patcher.patches_uuid
    )


def verify(
    base_model: Any,
    theirs: Sequence[dict[str, str]],
    totals: Totals,
    is_whole: bool = True,
    *,
    only_blocks: bool = False,
) -> Refusal | None:
    """Compare the weights in use bit for bit, if the ranks were asked for digests.

    Args:
        is_whole: every rank has all weights; else the ranks together have them.
        only_blocks: no others count: the workers run the blocks alone.
    """
    if not any(theirs):
        return None
    ours = digests(flux_of(base_model))
    everywhere = {*ours} if is_whole else {*ours}.difference(*theirs)
    for rank, found in enumerate(theirs):
        names = {
            name for name in {*everywhere, *found} if name.startswith(BLOCKS) or not only_blocks
        }
        wrong = [name for name in names if ours.get(name) != found.get(name)]
        if wrong:
            name = min(wrong)
            error = (
                f"Rank {rank} holds {len(wrong)} of {len(ours)} weights with other contents: "
                f"{name} is {found.get(name)} there and {ours.get(name)} here."
            )
            totals.failed(error)
            return Refusal("the weights in use on a rank are not ComfyUI's", error=error)
        totals.weights_verified += len(found)
    return None

"""``forward_orig`` of the FLUX family as one stage of a pipeline: once for each pipeline patch.

Runs in: worker process.

PipeFusion (arXiv:2405.14430), within one call of the model: ComfyUI owns the sampler, so all
patches of a call leave the last stage before the next call begins. It is an approximation: a patch
attends to keys and values of the call before where this call has none yet. An exact call
("warm-up") is one patch of all tokens; it goes from stage to stage and fills what later calls read.

    stage 0   patch 0 | patch 1 | patch 2 | patch 3
    stage 1             patch 0 | patch 1 | patch 2 | patch 3
    keys      of patches before this one: of this call; of those after it: of the call before

Nothing of the model is written here a second time; see ``stage.py`` for the blocks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.planning.pipeline import patch_shares, stage_blocks
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import SEQUENCE_DIM, SequenceShares
from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.worker.attention.masks import RankMasks, Span, inverse_of, order_of
from comfy_xdit_patch.worker.attention.prescribed import attention_of_blocks
from comfy_xdit_patch.worker.pipefusion.attention import Keys, PatchAttention
from comfy_xdit_patch.worker.pipefusion.kept_keys import KeptKeys, KeyValue, StreamKeys
from comfy_xdit_patch.worker.pipefusion.stage import Stage
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.node_patches import ModelPatches, PatchRefusedError
from comfy_xdit_patch.worker.shard.quantised import ScaledLayers, scales_on_weights
from comfy_xdit_patch.worker.shard.rank_tokens import RankTokens, gather_sequence
from comfy_xdit_patch.worker.shard.residuals import Residuals
from comfy_xdit_patch.worker.shard.sequence import keep_own, stream_counts


@dataclass(frozen=True, slots=True)
class Pass:
    """What one call computes: an exact call all tokens at once, any other patch after patch."""

    shares: SequenceShares
    kept: KeptKeys
    order: torch.Tensor | None
    """In an exact call: where each token whose keys are kept stands in this pass."""

    @property
    def num_patches(self) -> int:
        return self.shares.ring_degree

    def keys(self, patch: int, stage: Stage) -> Keys:
        """Return a function from the keys of one patch to the keys of all tokens."""
        if self.order is not None:
            return partial(self._fill, stage)
        degree = self.shares.ulysses_degree
        first = list(accumulate(self.shares.joint, initial=0))[patch * degree]
        return lambda k, v: self.kept.refresh(stage.block, k, v, first)

    def _fill(self, stage: Stage, k: torch.Tensor, v: torch.Tensor) -> KeyValue:
        assert self.order is not None
        self.kept.fill(stage.block, k, v, self.order)
        return k, v


@contextmanager
def pipelined_sequence(
    flux: Any,
    *,
    plan: ParallelPlan,
    groups: Groups,
    pipeline: Mapping[str, Any],
    streams: StreamKeys,
    num_image_tokens: int,
    num_rows: int,
    scaled: ScaledLayers,
    residuals: Residuals,
    patches: ModelPatches | None,
) -> Iterator[list[int]]:
    """Have ``flux.forward_orig`` compute one stage while this lasts; count what is sent.

    Its result is the model's on the ranks of the last stage, and zeros elsewhere.

    Args:
        pipeline: ``stream``, its number; ``is_warm_up``: whether the call is exact;
            ``num_patches`` of the calls that are not.
    """
    of_plan = groups.of_plan(plan)
    assert of_plan.pipeline is not None
    pipeline_group = of_plan.pipeline
    original = flux.forward_orig
    signature = inspect.signature(original)
    index, place = plan.sequence_index(groups.rank), plan.stage_index(groups.rank)
    num_blocks = len(flux.double_blocks) + len(flux.single_blocks)
    blocks = stage_blocks(plan, groups.rank, num_blocks)
    bytes_sent: list[int] = []

    @functools.wraps(original)
    def forward_orig(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        this = _pass(flux, given, plan, pipeline, streams, num_image_tokens)
        degree = this.shares.ulysses_degree
        own_shards = range(index, len(this.shares.joint), degree)
        stage = Stage(
            flux,
            blocks=blocks,
            index=place,
            group=pipeline_group,
            lengths=[this.shares.joint[shard] for shard in own_shards],
        )
        parts = []
        with stage.in_place():
            for patch, shard in enumerate(own_shards):
                call = signature.bind(*args, **kwargs)
                call.apply_defaults()
                mine = RankTokens(this.shares, shard, None)
                attention = PatchAttention(
                    shares=this.shares,
                    patch=patch,
                    index=index,
                    group=of_plan.ulysses,
                    keys=this.keys(patch, stage),
                    function=None if patches is None else patches.attention,
                )
                keep_own(
                    call.arguments,
                    mine,
                    attention=attention,
                    patches=patches,
                    own_control=partial(residuals.cut, mine=mine),
                )
                counts = stream_counts(
                    this.shares,
                    shard,
                    rows=call.arguments["img"].shape[0],
                    num_rows=num_rows,
                )
                with scales_on_weights(scaled, **counts):
                    out: torch.Tensor = original(*call.args, **call.kwargs)
                parts.append(out.narrow(SEQUENCE_DIM, 0, this.shares.image[shard]))
                bytes_sent.append(attention.bytes_sent)
        bytes_sent.append(stage.bytes_sent)
        if place + 1 < plan.pipefusion:
            shape = (parts[0].shape[0], num_image_tokens, parts[0].shape[2])
            return parts[0].new_zeros(shape)
        whole, num_bytes = _joined(parts, this.shares, of_plan.sequence)
        bytes_sent.append(num_bytes)
        return whole

    with attention_of_blocks(), own_attribute(flux, "forward_orig", forward_orig):
        try:
            yield bytes_sent
        except PatchRefusedError as error:
            # The other stages do not come to the same place: they wait for this one's tokens.
            raise WorkerError(f"A node's patch failed in one stage: {error}") from error


def _pass(
    flux: Any,
    values: Mapping[str, Any],
    plan: ParallelPlan,
    pipeline: Mapping[str, Any],
    streams: StreamKeys,
    num_image_tokens: int,
) -> Pass:
    def shares_of(num_patches: int) -> SequenceShares:
        return patch_shares(
            plan,
            num_patches,
            num_text_tokens=values["txt"].shape[SEQUENCE_DIM],
            num_image_tokens=num_image_tokens,
            num_reference_tokens=values["img_ids"].shape[SEQUENCE_DIM] - num_image_tokens,
            num_heads=flux.num_heads,
        )

    shares = shares_of(pipeline["num_patches"])
    if not pipeline["is_warm_up"]:
        return Pass(shares, streams.get(pipeline["stream"], shares), None)
    exact = shares_of(1)
    there, here = (
        RankMasks(of, 0).ranges(Span(range(len(of.joint)), True)) for of in (shares, exact)
    )
    device = values["txt"].device
    stands = inverse_of(here, device).index_select(0, order_of(there, device))
    return Pass(exact, streams.begin(pipeline["stream"], shares), stands)


def _joined(
    parts: list[torch.Tensor], shares: SequenceShares, group: Any
) -> tuple[torch.Tensor, int]:
    """Join the image tokens of all patches and ranks; count the bytes that this rank sent."""
    own = torch.cat(parts, SEQUENCE_DIM)
    degree = shares.ulysses_degree
    if degree == 1:
        return own, 0
    sizes = tuple(sum(shares.image[index::degree]) for index in range(degree))
    whole = gather_sequence(own, sizes=sizes, group=group)
    # Rank after rank, each with its shards of all patches; a patch's shards belong together.
    arrived = [n for index in range(degree) for n in shares.image[index::degree]]
    shards = torch.split(whole, arrived, SEQUENCE_DIM)
    num_patches = shares.ring_degree
    ordered = [shards[i * num_patches + p] for p in range(num_patches) for i in range(degree)]
    num_bytes = max(sizes) * (own.nbytes // own.shape[SEQUENCE_DIM]) * (degree - 1)
    return torch.cat(ordered, SEQUENCE_DIM), num_bytes

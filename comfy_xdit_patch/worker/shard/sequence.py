"""``forward_orig`` of the FLUX family on this rank's shard of the tokens.

Runs in: worker process.

Nothing of the model is written here a second time: its own ``forward_orig`` is given this rank's
tokens with their positions, attention over all tokens is put in by ComfyUI's own extension point,
and the tokens that come out are gathered. The blocks do not know that they see a part.

Arguments are bound by name, since their order differs between classes and versions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from comfy_xdit_patch.planning.family import member_of
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import SEQUENCE_DIM, SequenceShares, pays_in_halves
from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.worker.attention.attention import SequenceAttention
from comfy_xdit_patch.worker.attention.prescribed import attention_of_blocks
from comfy_xdit_patch.worker.attention.ulysses import nothing
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.later_columns import LaterColumns
from comfy_xdit_patch.worker.shard.node_patches import ModelPatches
from comfy_xdit_patch.worker.shard.pixel_space import sharded_head
from comfy_xdit_patch.worker.shard.quantised import ScaledLayers, scales_on_weights
from comfy_xdit_patch.worker.shard.rank_tokens import RankTokens, gather_sequence
from comfy_xdit_patch.worker.shard.residuals import Residuals

# Arguments of ``forward_orig`` with one row for each token, by the stream they belong to.
STREAM_OF = {"txt": "text", "txt_ids": "text", "img": "image", "img_ids": "image"}
REFERENCES = "reference_image_num_tokens"
"""An option of ComfyUI's, set by ``_forward``: tokens of each reference image."""


@contextmanager
def sharded_sequence(
    flux: Any,
    *,
    plan: ParallelPlan,
    groups: Groups,
    num_image_tokens: int,
    residuals: Residuals,
    patches: ModelPatches | None,
    later: LaterColumns | None,
) -> Iterator[list[int]]:
    """Shard the tokens inside ``flux.forward_orig`` while this lasts; count what is sent.

    Args:
        later: what computes while tokens are on their way; None to compute everything at once.
    """
    of_plan = groups.of_plan(plan)
    group = of_plan.sequence
    assert group is not None
    original = flux.forward_orig
    signature = inspect.signature(original)
    index = plan.sequence_index(groups.rank)
    is_pixel_space = member_of(flux).is_pixel_space
    bytes_sent: list[int] = []

    def gather(tokens: torch.Tensor, shares: SequenceShares) -> torch.Tensor:
        token_bytes = tokens.nbytes // tokens.shape[SEQUENCE_DIM]
        bytes_sent.append(max(shares.image) * token_bytes * (plan.sequence - 1))
        return gather_sequence(tokens, sizes=shares.image, group=group)

    with ExitStack() as until_the_head_is_done:

        @functools.wraps(original)
        def forward_orig(*args: Any, **kwargs: Any) -> torch.Tensor:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            values = call.arguments
            shares = shares_of(flux, values, plan, groups.rank, num_image_tokens)
            mine = RankTokens(shares, index, group)
            num_queries = sum(shares.joint) * values["img"].shape[0]
            attention = SequenceAttention(
                shares=shares,
                index=index,
                groups=of_plan,
                function=None if patches is None else patches.attention,
                wants_order=patches is not None and patches.wants_order,
                meanwhile=nothing if later is None else later.compute,
                in_halves=later is not None and pays_in_halves(min(shares.heads), num_queries),
            )
            keep_own(
                values,
                mine,
                attention=attention,
                patches=patches,
                own_control=lambda control: residuals.own(
                    control, shares=shares, mine=mine, group=group
                ),
                is_pixel_space=is_pixel_space,
            )
            if is_pixel_space:
                until_the_head_is_done.enter_context(
                    sharded_head(flux, mine, lambda tokens: gather(tokens, shares))
                )
            with nullcontext() if later is None else later.left():
                out = original(*call.args, **call.kwargs)
            out = out.narrow(SEQUENCE_DIM, 0, shares.image[index])
            bytes_sent.extend((attention.bytes_sent, mine.bytes_sent))
            return out if is_pixel_space else gather(out, shares)

        with attention_of_blocks(), own_attribute(flux, "forward_orig", forward_orig):
            yield bytes_sent


def keep_own(
    values: dict[str, Any],
    mine: RankTokens,
    *,
    attention: Any,
    patches: ModelPatches | None,
    own_control: Callable[[Any], Any],
    is_pixel_space: bool = False,
) -> None:
    """Cut the arguments of ``forward_orig`` to some tokens, and put attention over all of them in.

    Args:
        values: by name; changed in place.
        own_control: cuts the residuals of ControlNets.
    """
    for name, stream in STREAM_OF.items():
        # Pixels become tokens further down.
        if not (is_pixel_space and name == "img"):
            values[name] = mine.own(values[name], stream)
    if values.get("control") is not None:
        values["control"] = own_control(values["control"])
    if values.get("timestep_zero_index") is not None:
        values["timestep_zero_index"] = mine.ranges(values["timestep_zero_index"], "image")
    options = values["transformer_options"]
    if REFERENCES in options:
        num_references = mine.num_own_references
        options = {**options, REFERENCES: [num_references] if num_references else []}
    values["transformer_options"] = {
        **({} if patches is None else patches.options(mine)),
        **options,
        "optimized_attention_override": attention,
    }


@contextmanager
def whole_counts(
    flux: Any,
    *,
    plan: ParallelPlan,
    groups: Groups,
    scaled: ScaledLayers,
    num_image_tokens: int,
    num_rows: int,
) -> Iterator[None]:
    """Tell layers of old scaled fp8 how many tokens the whole call, of all rows, has."""
    inner = flux.forward_orig
    signature = inspect.signature(inner)
    index = plan.sequence_index(groups.rank)

    def forward_orig(*args: Any, **kwargs: Any) -> torch.Tensor:
        values = signature.bind(*args, **kwargs).arguments
        shares = shares_of(flux, values, plan, groups.rank, num_image_tokens)
        rows = values["img"].shape[0]
        counts = stream_counts(shares, index, rows=rows, num_rows=num_rows)
        with scales_on_weights(scaled, **counts):
            out: torch.Tensor = inner(*args, **kwargs)
            return out

    with own_attribute(flux, "forward_orig", forward_orig):
        yield


def stream_counts(
    shares: SequenceShares, index: int, *, rows: int, num_rows: int
) -> dict[str, dict[str | None, int]]:
    """Tokens times rows by stream, of the ``whole`` call and of this rank's (``local``) part.

    Args:
        rows: of this rank.
        num_rows: of the whole call.
    """
    local: dict[str | None, int] = {
        "text": shares.text[index],
        "image": shares.image[index] + shares.reference[index],
        "joint": shares.joint[index],
        None: 1,
    }
    whole: dict[str | None, int] = {
        "text": sum(shares.text),
        "image": sum(shares.image) + sum(shares.reference),
        "joint": sum(shares.joint),
        None: 1,
    }
    return {
        "whole": {stream: n * num_rows for stream, n in whole.items()},
        "local": {stream: n * rows for stream, n in local.items()},
    }


def shares_of(
    flux: Any, values: Mapping[str, Any], plan: ParallelPlan, rank: int, num_image_tokens: int
) -> SequenceShares:
    """The shares of a rank's group in the tokens of a call of ``forward_orig``."""
    return plan.sequence_shares(
        rank,
        num_text_tokens=values["txt"].shape[SEQUENCE_DIM],
        num_image_tokens=num_image_tokens,
        num_reference_tokens=values["img_ids"].shape[SEQUENCE_DIM] - num_image_tokens,
        num_heads=plan.local_heads(rank, flux.num_heads),
    )

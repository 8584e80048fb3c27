"""ComfyUI's own ControlNet forward on this rank's shard of the tokens.

Runs in: worker process.

As in ``sequence.py``, nothing is written a second time: ``ControlNetFlux.forward`` makes
tokens of latent and hint, ``forward_orig`` is given this rank's, and what it returns stays here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import SequenceShares
from comfy_xdit_patch.planning.workload import num_tokens
from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.worker.attention.attention import SequenceAttention
from comfy_xdit_patch.worker.attention.prescribed import attention_of_blocks
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.rank_tokens import RankTokens, rows_of
from comfy_xdit_patch.worker.shard.residuals import ResidualSet
from comfy_xdit_patch.worker.shard.sequence import STREAM_OF

# Arguments of ``forward_orig`` with one row for each token, by the stream they belong to.
CONTROL_STREAM_OF = {**STREAM_OF, "controlnet_cond": "image"}

Layout = dict[str, list[int | None]]
"""Which of the residuals every block of the diffusion model takes."""


def control_share(
    net: Any, arguments: Mapping[str, Any], *, plan: ParallelPlan, groups: Groups
) -> tuple[Layout, ResidualSet, int]:
    """Compute this rank's tokens of every residual.

    Args:
        net: ComfyUI's ``ControlNetFlux`` module.
        arguments: keyword arguments of its ``forward`` for the whole batch.

    Returns:
        Where the residuals go, this rank's part of them, and the bytes it sent to other ranks.

    Collective:
        Every rank of the plan must call this with the same arguments.
    """
    first, end = plan.batch_rows(groups.rank, arguments["x"].shape[0])
    mine = rows_of(dict(arguments), first, end) if plan.batch > 1 else dict(arguments)
    shares = plan.sequence_shares(
        groups.rank,
        num_text_tokens=mine["context"].shape[1],
        num_image_tokens=num_tokens(net, mine["x"]),
        num_heads=plan.local_heads(groups.rank, net.num_heads),
    )
    with ExitStack() as stack:
        bytes_sent: list[int] = []
        if plan.sequence > 1:
            bytes_sent = stack.enter_context(_sharded(net, shares, plan=plan, groups=groups))
        out = type(net).forward(net, **mine)
    unique: dict[int, int] = {}
    tensors: list[torch.Tensor] = []
    layout: Layout = {}
    for name, residuals in out.items():
        layout[name] = []
        for residual in residuals:
            if residual is not None and id(residual) not in unique:
                unique[id(residual)] = len(tensors)
                tensors.append(residual)
            layout[name].append(None if residual is None else unique[id(residual)])
    return layout, ResidualSet(shares.image, tensors), sum(bytes_sent)


@contextmanager
def _sharded(
    net: Any, shares: SequenceShares, *, plan: ParallelPlan, groups: Groups
) -> Iterator[list[int]]:
    """Shard the tokens inside ``net.forward_orig`` while this lasts; count what is sent."""
    of_plan = groups.of_plan(plan)
    assert of_plan.sequence is not None
    index = plan.sequence_index(groups.rank)
    original = net.forward_orig
    signature = inspect.signature(original)
    mine = RankTokens(shares, index, of_plan.sequence)
    bytes_sent: list[int] = []

    @functools.wraps(original)
    def forward_orig(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        values = call.arguments
        for name, stream in CONTROL_STREAM_OF.items():
            values[name] = mine.own(values[name], stream)
        # A union ControlNet puts the token of its mode before the text: once, not on every rank.
        modes = values.get("control_type") or []
        if index > 0 and modes:
            values["control_type"] = []
        text = (shares.text[0] + len(modes), *shares.text[1:])
        attention = SequenceAttention(
            shares=dataclasses.replace(shares, text=text), index=index, groups=of_plan
        )
        with ExitStack() as stack:
            for block in (*net.double_blocks, *net.single_blocks):
                # ControlNetFlux gives its blocks no options.
                forward = functools.partial(
                    block.forward,
                    transformer_options={"optimized_attention_override": attention},
                )
                stack.enter_context(own_attribute(block, "forward", forward))
            out = original(*call.args, **call.kwargs)
        bytes_sent.append(attention.bytes_sent)
        return out

    with attention_of_blocks(), own_attribute(net, "forward_orig", forward_orig):
        yield bytes_sent

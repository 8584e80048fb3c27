"""ComfyUI's own FLUX forward on this rank's shard of the tokens.

Runs in: worker process.

Nothing of FLUX is written here a second time. ``Flux._forward`` makes tokens of the whole latent;
``Flux.forward_orig`` is then given this rank's tokens with their positions, and attention is ours;
its output tokens are gathered, and ``_forward`` goes on with the whole. Everything else in FLUX
works on one token at a time, but for two quantised layers (``whole_tensor.py``).

Arguments are bound by name, since their order differs between ComfyUI versions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from comfy_xdit_patch.engine.attention import UlyssesAttention
from comfy_xdit_patch.engine.groups import Groups
from comfy_xdit_patch.engine.own_tokens import OwnTokens
from comfy_xdit_patch.engine.sequence import SEQUENCE_DIM, gather_sequence
from comfy_xdit_patch.engine.whole_tensor import (
    ScaledLayers,
    scales_on_weights,
    whole_input_scales,
)
from comfy_xdit_patch.planning.plan import ParallelPlan, SequenceShares
from comfy_xdit_patch.planning.workload import num_tokens

# Arguments of ``Flux.forward_orig`` with one row for each token, by the stream they belong to.
TEXT_ARGUMENTS = ("txt", "txt_ids")
IMAGE_ARGUMENTS = ("img", "img_ids")


def forward_share(
    flux: Any,
    arguments: Mapping[str, Any],
    *,
    plan: ParallelPlan,
    groups: Groups,
    scaled: ScaledLayers,
) -> tuple[torch.Tensor, int]:
    """Compute the rows of this rank's batch share, together with its sequence group.

    Args:
        flux: ComfyUI's ``Flux`` module.
        arguments: keyword arguments of ``Flux._forward`` for the whole batch.
        scaled: its layers of old scaled fp8.

    Returns:
        The output for this rank's rows, whole on every rank of the sequence group, and the bytes
        this rank sent to other ranks.

    Collective:
        Every rank of the plan must call this with the same arguments.
    """
    first, end = plan.batch_rows(groups.rank, arguments["x"].shape[0])
    mine = _rows(dict(arguments), first, end) if plan.batch_degree > 1 else dict(arguments)
    mine["transformer_options"] = dict(mine.get("transformer_options") or {})
    num_image_tokens = num_tokens(flux, mine["x"])
    with ExitStack() as stack:
        bytes_sent: list[int] = []
        if plan.ulysses_degree > 1:
            bytes_sent = stack.enter_context(
                _sharded_sequence(flux, plan=plan, groups=groups, num_image_tokens=num_image_tokens)
            )
        if scaled and plan.world_size > 1:
            stack.enter_context(
                _whole_counts(
                    flux,
                    plan=plan,
                    groups=groups,
                    scaled=scaled,
                    num_image_tokens=num_image_tokens,
                )
            )
        stack.enter_context(whole_input_scales())
        out = type(flux)._forward(flux, **mine)
    return out, sum(bytes_sent)


@contextmanager
def _whole_counts(
    flux: Any,
    *,
    plan: ParallelPlan,
    groups: Groups,
    scaled: ScaledLayers,
    num_image_tokens: int,
) -> Iterator[None]:
    """Tell layers of old scaled fp8 how many tokens the whole call has."""
    inner = flux.forward_orig
    had_own = "forward_orig" in vars(flux)
    signature = inspect.signature(inner)
    index = plan.sequence_index(groups.rank)

    def forward_orig(*args: Any, **kwargs: Any) -> torch.Tensor:
        values = signature.bind(*args, **kwargs).arguments
        rows = values["img"].shape[0]
        text, image = (values[name].shape[SEQUENCE_DIM] for name in ("txt", "img"))
        shares = _shares(flux, values, plan, num_image_tokens)
        visual = shares.image[index] + shares.reference[index]
        local = {"text": shares.text[index], "image": visual, None: 1}
        local["joint"] = local["text"] + local["image"]
        whole = {"text": text, "image": image, "joint": text + image, None: 1}
        with scales_on_weights(
            scaled,
            whole={stream: n * rows * plan.batch_degree for stream, n in whole.items()},
            local={stream: n * rows for stream, n in local.items()},
        ):
            out: torch.Tensor = inner(*args, **kwargs)
            return out

    flux.forward_orig = forward_orig
    try:
        yield
    finally:
        if had_own:
            flux.forward_orig = inner
        else:
            del flux.forward_orig


def _shares(
    flux: Any, values: Mapping[str, Any], plan: ParallelPlan, num_image_tokens: int
) -> SequenceShares:
    """The shares of all ranks in the tokens of a call of ``forward_orig``."""
    return SequenceShares.even(
        num_text_tokens=values["txt"].shape[SEQUENCE_DIM],
        num_image_tokens=num_image_tokens,
        num_reference_tokens=values["img"].shape[SEQUENCE_DIM] - num_image_tokens,
        num_heads=flux.num_heads,
        num_shards=plan.ulysses_degree,
    )


@contextmanager
def _sharded_sequence(
    flux: Any, *, plan: ParallelPlan, groups: Groups, num_image_tokens: int
) -> Iterator[list[int]]:
    """Shard the tokens inside ``flux.forward_orig`` while this lasts; count what is sent."""
    group = groups.of_plan(plan).sequence
    assert group is not None
    original = flux.forward_orig
    signature = inspect.signature(original)
    index = plan.sequence_index(groups.rank)
    bytes_sent: list[int] = []

    @functools.wraps(original)
    def forward_orig(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        values = call.arguments
        shares = _shares(flux, values, plan, num_image_tokens)
        mine = OwnTokens(shares, index)
        for name in TEXT_ARGUMENTS:
            values[name] = mine.text(values[name])
        for name in IMAGE_ARGUMENTS:
            values[name] = mine.image(values[name])
        if values.get("control") is not None:
            values["control"] = mine.control(values["control"])
        if values.get("timestep_zero_index") is not None:
            values["timestep_zero_index"] = mine.ranges(values["timestep_zero_index"])
        attention = UlyssesAttention(shares=shares, index=index, group=group)
        values["transformer_options"] = {
            **values["transformer_options"],
            "optimized_attention_override": attention,
        }
        out = original(*call.args, **call.kwargs).narrow(SEQUENCE_DIM, 0, shares.image[index])
        token_bytes = out.nbytes // out.shape[SEQUENCE_DIM]
        gathered = max(shares.image) * token_bytes * (plan.ulysses_degree - 1)
        bytes_sent.extend((attention.bytes_sent, gathered))
        return gather_sequence(out, sizes=shares.image, group=group)

    flux.forward_orig = forward_orig
    try:
        yield bytes_sent
    finally:
        del flux.forward_orig


def _rows(value: Any, first: int, end: int) -> Any:
    """Take rows of the batch from every tensor of an argument."""
    if isinstance(value, torch.Tensor):
        return value[first:end]
    if isinstance(value, list):
        return [_rows(item, first, end) for item in value]
    if isinstance(value, dict):
        return {key: _rows(item, first, end) for key, item in value.items()}
    return value

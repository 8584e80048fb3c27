"""ComfyUI's own FLUX forward on this rank's shard of the tokens.

Runs in: worker process.

Nothing of FLUX is written here a second time. ``Flux._forward`` makes tokens of the whole latent;
``Flux.forward_orig`` is then given this rank's tokens with their positions, and attention is ours;
its output tokens are gathered, and ``_forward`` goes on with the whole. Everything else in FLUX
works on one token at a time, but for two quantised layers (``shard/quantised.py``).

Arguments are bound by name, since their order differs between ComfyUI versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.workload import num_tokens
from comfy_xdit_patch.worker.pipefusion.kept_keys import StreamKeys
from comfy_xdit_patch.worker.pipefusion.sequence import pipelined_sequence
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.later_columns import LaterColumns
from comfy_xdit_patch.worker.shard.node_patches import ModelPatches
from comfy_xdit_patch.worker.shard.quantised import ScaledLayers, whole_input_scales
from comfy_xdit_patch.worker.shard.rank_tokens import rows_of
from comfy_xdit_patch.worker.shard.residuals import Residuals
from comfy_xdit_patch.worker.shard.sequence import sharded_sequence, whole_counts


def forward_share(
    flux: Any,
    arguments: Mapping[str, Any],
    *,
    plan: ParallelPlan,
    groups: Groups,
    scaled: ScaledLayers,
    residuals: Residuals,
    patches: ModelPatches | None,
    streams: StreamKeys,
    later: LaterColumns | None,
    pipeline: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, int]:
    """Compute the rows of this rank's batch share, together with its sequence group.

    Args:
        flux: ComfyUI's ``Flux`` module.
        arguments: keyword arguments of ``Flux._forward`` for the whole batch.
        scaled: the layers of ``flux`` that are old scaled fp8, by name.
        patches: the patches of nodes, which ``arguments`` do not hold.
        residuals: what ControlNets left on this rank; ``control`` refers to them.
        streams: keys and values that PipeFusion keeps.
        later: what computes while tokens are on their way; None to compute everything at once.
        pipeline: how this call uses them; see ``pipelined_sequence``.

    Returns:
        The output for this rank's rows, whole on every rank of the sequence group (of the last
        stage, in a pipeline), and the bytes this rank sent to other ranks.

    Collective:
        Every rank of the plan must call this with the same arguments.
    """
    first, end = plan.batch_rows(groups.rank, arguments["x"].shape[0])
    mine = rows_of(dict(arguments), first, end) if plan.batch > 1 else dict(arguments)
    mine["transformer_options"] = dict(mine.get("transformer_options") or {})
    num_image_tokens = num_tokens(flux, mine["x"])
    with ExitStack() as stack:
        bytes_sent: list[int] = []
        if plan.pipefusion > 1:
            assert pipeline is not None
            bytes_sent = stack.enter_context(
                pipelined_sequence(
                    flux,
                    plan=plan,
                    groups=groups,
                    pipeline=pipeline,
                    streams=streams,
                    num_image_tokens=num_image_tokens,
                    num_rows=arguments["x"].shape[0],
                    scaled=scaled,
                    residuals=residuals,
                    patches=patches,
                )
            )
            out = type(flux)._forward(flux, **mine)
            return out, sum(bytes_sent)
        if plan.sequence > 1:
            bytes_sent = stack.enter_context(
                sharded_sequence(
                    flux,
                    plan=plan,
                    groups=groups,
                    num_image_tokens=num_image_tokens,
                    residuals=residuals,
                    patches=patches,
                    later=later,
                )
            )
        else:
            if mine.get("control") is not None:
                mine["control"] = residuals.whole(mine["control"])
            if patches is not None:
                mine["transformer_options"] = {
                    **patches.options(None),
                    **mine["transformer_options"],
                }
                if patches.attention is not None:
                    mine["transformer_options"]["optimized_attention_override"] = patches.attention
        if scaled and plan.world_size > 1:
            stack.enter_context(
                whole_counts(
                    flux,
                    plan=plan,
                    groups=groups,
                    scaled=scaled,
                    num_image_tokens=num_image_tokens,
                    num_rows=arguments["x"].shape[0],
                )
            )
        stack.enter_context(whole_input_scales())
        out = type(flux)._forward(flux, **mine)
    return out, sum(bytes_sent)

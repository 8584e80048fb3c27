"""Run one call of the diffusion model on the workers.

Runs in: host process.

Knows slots and messages; knows nothing of runs, fall-backs, weights or settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from comfy_xdit_patch.errors import DeclinedError
from comfy_xdit_patch.host.pool.crew import Room, Wire
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.reading.node_patches import other_options
from comfy_xdit_patch.host.step.pipefusion import PipelinedCall
from comfy_xdit_patch.host.step.residuals_there import encode_control
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.workload import CARRIED_ARGUMENTS
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.answers import check_shape
from comfy_xdit_patch.wire.messages.replies import Declined, Done, short
from comfy_xdit_patch.wire.messages.requests import Forget, Forward, Tree

# What the family reads of transformer_options besides patches, which eligibility refuses.
CARRIED_OPTIONS = ("rope_options", "chroma_radiance_options")


class RemoteForward:
    """The workers, as a function from arguments to a tensor."""

    def __init__(self, wire: Wire, totals: Totals) -> None:
        self._wire = wire
        self._totals = totals
        self.gone_objects: list[int] = []
        """Numbers of nodes' objects whose run is over."""

    def forward(
        self,
        model: int,
        arguments: Mapping[str, Any],
        *,
        plan: ParallelPlan,
        patches: dict[str, Any] | None,
        out_channels: int,
        poll: Poll,
        pipeline: PipelinedCall | None = None,
        room: Room | None = None,
    ) -> torch.Tensor:
        """Compute one call on all ranks.

        Args:
            model: number of a model that every rank holds.
            arguments: the bound arguments of ``Flux._forward``.
            patches: of nodes, from ``carried.py``.
            out_channels: channels of the result; its other sizes are those of ``x``.
            pipeline: decides how PipeFusion computes the call.
            room: for a look whether a card has it; None to compute at once.

        Returns:
            The model's output, on the device of ``x``, in a tensor of its own.

        Raises:
            UncarriedArgumentError: an argument is not of a type that can cross.
            DeclinedError: a node's patch cannot run there.
            CardsFullError: there is no room on a card.
            WorkerError: the workers are lost.
        """
        slots = self._wire.slots
        x = arguments["x"]
        shape = (x.shape[0], out_channels, *x.shape[2:])
        options = arguments.get("transformer_options") or {}
        with self._wire.turn(poll) as turn:
            written, control = slots.bytes_written, self._wire.control_bytes
            names = [n for n in CARRIED_ARGUMENTS if n in arguments and n != "control"]
            tree: dict[str, Tree] = turn.place({name: arguments[name] for name in names})
            if arguments.get("control") is not None:
                tree["control"] = encode_control(
                    arguments["control"], turn.put, generation=self._wire.generation, plan=plan
                )
            tree["transformer_options"] = {
                name: turn.put(name, options[name]) for name in CARRIED_OPTIONS if name in options
            }
            if patches is not None:
                patches = {**patches, "options": turn.put("options", other_options(options))}
                tree["patches"] = patches
            result = slots.result_slot(math.prod(shape) * torch.float32.itemsize)
            gone = [self.gone_objects.pop() for _ in range(len(self.gone_objects))]
            replies = turn.compute(
                Forward(
                    request=turn.number,
                    model=model,
                    grid=list(plan.grid),
                    weights=list(plan.weights),
                    arguments=tree,
                    result=result.number,
                    pipeline=None if pipeline is None else pipeline.tree(tree),
                ),
                room=room,
                first=[Forget(calls=[], objects=gone, tokens=[])] if gone else [],
            )
            first = replies[0]
            if isinstance(first, Declined):
                raise DeclinedError(short(first.reason))
            assert isinstance(first, Done)
            check_shape(first, shape)
            shared = result.view(getattr(torch, first.dtype), first.shape)  # or MessageError
            out = torch.empty_like(shared, device=x.device).copy_(shared)
        self._totals.bytes_to_workers += slots.bytes_written - written
        self._totals.bytes_to_workers += self._wire.control_bytes - control
        self._count(replies)
        return out

    def _count(self, replies: Sequence[Any]) -> None:
        for rank, reply in enumerate(replies):
            self._totals.num_forwards[rank] = reply.num_forwards
            self._totals.step_seconds[rank] = reply.seconds
            self._totals.busy_seconds[rank] = reply.busy_seconds
            self._totals.launch_bound[rank] = reply.is_launch_bound
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
            self._totals.bytes_from_workers += reply.bytes_written


def arguments_of(flux: Any, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call, with what the model itself would take from its parameters."""
    name = "default_ref_method"
    if not arguments.get("ref_latents") or not hasattr(flux.params, name):
        return arguments
    return {"ref_latents_method": getattr(flux.params, name), **arguments}

"""Run one call of the diffusion model on the workers.

Runs in: host process.

Knows slots and messages; knows nothing of runs, fall-backs, weights or settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pool.crew import Crew, Room, Turn
from comfy_xdit_patch.host.reading.node_patches import other_options
from comfy_xdit_patch.host.step.outcome import Computed, result_of
from comfy_xdit_patch.host.step.pipefusion import PipelinedCall
from comfy_xdit_patch.host.step.residuals_there import ControlCall, calls_kept, encode_control
from comfy_xdit_patch.planning.family import num_out_channels
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.workload import CARRIED_ARGUMENTS
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.replies import Done, short
from comfy_xdit_patch.wire.messages.requests import Forward, Tree

# What the family reads of transformer_options besides patches, which eligibility refuses.
CARRIED_OPTIONS = ("rope_options", "chroma_radiance_options")


PATIENCE = 3
"""Calls in a row whose pace launches set, until they are made without overlap from then on: new
ranks launch slowly at first, and without overlap there are fewer launches."""


class _Paces:
    """Of calls by their kind: how many of the last ones that overlapped a rank's CPU held up."""

    def __init__(self, _: Crew) -> None:
        self._held_up: dict[tuple[int, ...], int] = {}
        self._last: tuple[int, tuple[int, ...] | None] = 0, None
        """The last call's request, with its kind; None if it says nothing."""

    def overlaps(self, kind: tuple[int, ...]) -> bool:
        """Whether the ranks are to compute while tokens are on their way."""
        return self._held_up.get(kind, 0) < PATIENCE

    def note(self, kind: tuple[int, ...] | None, computed: Computed) -> None:
        """Note a call, and what is known now of one: this or the one before.

        Args:
            kind: None if its pace says nothing of those to come.
        """
        timed = computed.timed_of(kind, self._last)
        self._last = computed.request, kind
        if timed is not None and self.overlaps(timed):
            is_bound = computed.is_launch_bound
            self._held_up[timed] = self._held_up.get(timed, 0) + 1 if is_bound else 0


class RemoteForward:
    """The workers, as a function from arguments to a tensor."""

    def __init__(self, totals: Totals, *, captures: bool = False) -> None:
        """Prepare.

        Args:
            captures: have the ranks make CUDA graphs of their forwards.
        """
        self._totals = totals
        self._captures = captures

    def forward(
        self,
        crew: Crew,
        model: int,
        call: Call,
        plan: ParallelPlan,
        *,
        pipeline: PipelinedCall | None = None,
        room: Room | None = None,
    ) -> Computed:
        """Compute one call on all ranks.

        Args:
            model: number of a model that every rank holds.
            pipeline: decides how PipeFusion computes the call.
            room: for a look whether a card has it; None to compute at once.

        Raises:
            UncarriedValueError: an argument is not of a type that can cross.
            DeclinedError: a node's patch cannot run there.
            CardsFullError: there is no room on a card.
            WorkerError: the workers are lost.
        """
        slots = crew.slots
        x = call.arguments["x"]
        shape = (x.shape[0], num_out_channels(call.module, x.shape[1]), *x.shape[2:])
        # Where calls become graphs, launches before that was wanted say nothing.
        kind = (self._captures, *shape)
        with crew.turn(call.poll) as turn:
            written, control = slots.bytes_written, crew.control_bytes
            tree = _tree(turn, call, plan, kept=crew.of(calls_kept))
            patches = call.carried.tree
            if patches is not None:
                others = other_options(call.options)
                patches = {**patches, "options": turn.put("options", others)}
            compiled = call.compiled
            result = slots.result_slot(math.prod(shape) * torch.float32.itemsize)
            replies = turn.compute(
                Forward(
                    request=turn.number,
                    model=model,
                    grid=list(plan.grid),
                    weights=list(plan.weights),
                    arguments=tree,
                    result=result.number,
                    pipeline=None if pipeline is None else pipeline.tree(tree),
                    patches=patches,
                    compiled=None if isinstance(compiled, Refusal) else compiled,
                    overlaps=crew.of(_Paces).overlaps(kind),
                    captures=self._captures,
                ),
                room=room,
            )
            out = result_of(replies, result, shape, x.device)
        self._totals.bytes_to_workers += slots.bytes_written - written
        self._totals.bytes_to_workers += crew.control_bytes - control
        done = [reply for reply in replies if isinstance(reply, Done)]
        self._count(done)
        timed = {reply.timed for reply in done}
        computed = Computed(
            out,
            busy_s=tuple(reply.busy_seconds for reply in done),
            is_launch_bound=any(reply.is_launch_bound for reply in done),
            request=done[0].request,
            timed=timed.pop() if len(timed) == 1 else 0,
            is_finite=all(reply.is_finite for reply in done),
            is_in_making=any(reply.num_graphs or reply.has_captured for reply in done),
            uncompiled=tuple(short(reply.uncompiled) for reply in done if reply.uncompiled),
            uncaptured=tuple(short(reply.uncaptured) for reply in done if reply.uncaptured),
        )
        # Calls that are to be a graph soon say nothing of the launches then.
        tells = not self._captures or any(reply.is_replayed or reply.uncaptured for reply in done)
        crew.of(_Paces).note(kind if tells else None, computed)
        return computed

    def _count(self, replies: Sequence[Done]) -> None:
        for rank, reply in enumerate(replies):
            self._totals.ran(
                rank,
                num_forwards=reply.num_forwards,
                step_s=reply.seconds,
                busy_s=reply.busy_seconds,
                is_launch_bound=reply.is_launch_bound,
                blocks_compiled=reply.num_compiled,
                graphs=reply.num_graphs,
                is_replayed=reply.is_replayed,
            )
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
            self._totals.bytes_from_workers += reply.bytes_written


def _tree(
    turn: Turn, call: Call, plan: ParallelPlan, *, kept: WeakSet[ControlCall]
) -> dict[str, Tree]:
    """Put what a call depends on into slots, and say where it lies."""
    arguments = _with_default_method(call)
    names = [name for name in CARRIED_ARGUMENTS if name in arguments and name != "control"]
    tree: dict[str, Tree] = turn.place({name: arguments[name] for name in names})
    if arguments.get("control") is not None:
        tree["control"] = encode_control(arguments["control"], turn.put, kept=kept, plan=plan)
    options = call.options
    tree["transformer_options"] = {
        name: turn.put(name, options[name]) for name in CARRIED_OPTIONS if name in options
    }
    return tree


def _with_default_method(call: Call) -> Mapping[str, Any]:
    """The arguments of a call, with what the model itself would take from its parameters."""
    name = "default_ref_method"
    if not call.arguments.get("ref_latents") or not hasattr(call.module.params, name):
        return call.arguments
    return {"ref_latents_method": getattr(call.module.params, name), **call.arguments}

"""Run one call of a ControlNet on the workers.

Runs in: host process.

Knows slots and messages; knows nothing of runs, weights or settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.deferred import ControlCall, DeferredResidual, Residuals
from comfy_xdit_patch.patching.wire import Room, Wire
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.transport.answers import check_shape
from comfy_xdit_patch.transport.calls import Control, Forget
from comfy_xdit_patch.transport.messages import Message
from comfy_xdit_patch.transport.replies import Controlled, Reply
from comfy_xdit_patch.workers.exchange import Poll

# Other keyword arguments are swallowed by ``ControlNetFlux.forward`` unread.
CARRIED_ARGUMENTS = ("x", "timesteps", "context", "y", "guidance", "hint", "control_type")


class RemoteControl:
    """The workers, as a function from a ControlNet's arguments to its residuals."""

    def __init__(self, wire: Wire, totals: Totals) -> None:
        self._wire = wire
        self._totals = totals
        self._numbers = itertools.count(1)
        self._gone: list[int] = []

    def forward(
        self,
        model: int,
        arguments: Mapping[str, Any],
        *,
        plan: ParallelPlan,
        compute: Callable[[], Residuals],
        poll: Poll,
        room: Room | None = None,
    ) -> Residuals:
        """Compute one call on all ranks.

        Args:
            model: number of a ControlNet that every rank holds.
            arguments: the bound arguments of ``ControlNetFlux.forward``.
            compute: ComfyUI's own forward with them.
            room: for a look whether a card has it; None to compute at once.

        Returns:
            What ComfyUI's own forward returns, in residuals that are the workers'.

        Raises:
            UncarriedArgumentError: an argument is not of a type that can cross.
            CardsFullError: there is no room on a card.
            WorkerError: the workers are lost.
        """
        slots = self._wire.slots
        tree: dict[str, Any] = {}
        call = next(self._numbers)
        written = slots.bytes_written

        def prepare() -> Sequence[Message]:
            paths = {n: f"controlnet{model}.{n}" for n in CARRIED_ARGUMENTS if n in arguments}
            slots.begin_call({path: arguments[name] for name, path in paths.items()})
            tree.update({name: slots.place(path, arguments[name]) for name, path in paths.items()})
            return self._take_gone()

        def check(replies: Sequence[Reply]) -> None:
            for reply in replies:
                if isinstance(reply, Controlled):
                    check_shape(reply, (arguments["x"].shape[0], *reply.shape[1:3]))

        replies = self._wire.call(
            lambda number, working_bytes: Control(
                request=number,
                model=model,
                call=call,
                grid=list(plan.grid),
                weights=list(plan.weights),
                arguments=tree,
                working_bytes=working_bytes,
            ),
            poll=poll,
            prepare=prepare,
            room=room,
            check=check,
        )
        self._totals.bytes_to_workers += slots.bytes_written - written
        self._totals.controls_parallel += 1
        for rank, reply in enumerate(replies):
            assert isinstance(reply, Controlled)
            self._totals.control_seconds[rank] = reply.seconds
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
        first = replies[0]
        assert isinstance(first, Controlled)
        kept = ControlCall(
            call,
            generation=self._wire.generation,
            plan=plan,
            layout=first.layout,
            compute=compute,
            gone=self._gone,
        )
        num_residuals = 1 + max(i for part in first.layout.values() for i in part if i is not None)
        residuals = [
            DeferredResidual.make(
                ("residual", kept, index),
                shape=first.shape,
                dtype=getattr(torch, first.dtype),
                device=arguments["x"].device,
            )
            for index in range(num_residuals)
        ]
        return {
            name: tuple(None if i is None else residuals[i] for i in part)
            for name, part in first.layout.items()
        }

    def _take_gone(self) -> list[Message]:
        """Tell the workers which residuals nothing refers to any more."""
        gone, self._gone[:] = self._gone[:], []
        return [Forget(calls=gone, objects=[], tokens=[])] if gone else []

"""Run one call of the diffusion model on the workers.

Runs in: host process.

Knows slots, messages and weights; knows nothing of runs, fall-backs or settings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.models import KnownModel
from comfy_xdit_patch.planning.eligibility import CARRIED_ARGUMENTS
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.transport.fingerprint import ForeignTensorError, fingerprint
from comfy_xdit_patch.transport.messages import (
    Done,
    Forward,
    Load,
    Loaded,
    Map,
    Message,
    NotLoaded,
    Unload,
    Unmap,
)
from comfy_xdit_patch.transport.slots import Slot, SlotTable
from comfy_xdit_patch.workers.exchange import Poll
from comfy_xdit_patch.workers.pool import Pool

log = logging.getLogger("comfy_xdit_patch")

# What core FLUX reads of transformer_options besides patches, which eligibility refuses.
CARRIED_OPTIONS = ("rope_options",)


class RemoteForward:
    """The workers, as a function from arguments to a tensor."""

    def __init__(self, pool: Pool, totals: Totals) -> None:
        self._pool = pool
        self._totals = totals
        self._slots = SlotTable()
        self._fds: Sequence[tuple[Slot, int]] = ()
        self._generation = 0
        self._refused: dict[int, Refusal] = {}
        self.loaded: int | None = None
        """Number of the model that every rank holds now."""

    def load(
        self,
        flux: Any,
        known: KnownModel,
        *,
        manual_cast_dtype: torch.dtype | None,
        poll: Poll,
    ) -> Refusal | None:
        """Have every rank hold this model's weights, and check that they are the host's.

        Raises:
            WorkerError: the workers are lost.
        """
        self._follow_generation()
        if known.number in self._refused:
            return self._refused[known.number]
        try:
            expected = fingerprint(flux, manual_cast_dtype=manual_cast_dtype)
        except ForeignTensorError as error:
            return Refusal(f"the model has {error} weights")
        self.loaded = None
        replies = self._pool.request(
            lambda number: Load(number, known.number, known.source), poll=poll
        )
        for rank, reply in enumerate(replies):
            if isinstance(reply, NotLoaded):
                self._totals.last_error = f"Rank {rank} could not load the model: {reply.error}"
                log.error("xDiT: %s", self._totals.last_error)
                # Trying again in every run would cost the time of a load in every run.
                self._refused[known.number] = Refusal("a worker could not load the model")
                return self._refused[known.number]
            assert isinstance(reply, Loaded)
            self._totals.load_seconds[rank] = round(reply.seconds, 3)
            if reply.fingerprint != expected:
                return Refusal("the model in ComfyUI's memory is not what its file holds")
        self.loaded = known.number
        return None

    def unload(self) -> None:
        """Have every rank drop its weights.

        Raises:
            WorkerError: the workers are lost.
        """
        self.loaded = None
        self._pool.request(Unload, poll=_no_poll)

    def forward(
        self,
        known: KnownModel,
        arguments: Mapping[str, Any],
        *,
        plan: ParallelPlan,
        out_channels: int,
        poll: Poll,
    ) -> torch.Tensor:
        """Compute one call on all ranks.

        Args:
            arguments: the bound arguments of ``Flux._forward``.
            out_channels: channels of the result; its other sizes are those of ``x``.

        Returns:
            The model's output, on the device of ``x``, in a tensor of its own.

        Raises:
            UncarriedArgumentError: an argument is not of a type that can cross.
            WorkerError: the workers are lost.
        """
        self._follow_generation()
        x = arguments["x"]
        tree: dict[str, Any] = {}
        num_results = x.shape[0] * out_channels * x.shape[2] * x.shape[3]
        written = self._slots.bytes_written
        control = self._pool.control_bytes
        result = self._slots.result_slot(num_results * torch.float32.itemsize)

        def prepare() -> Sequence[tuple[Message, int | None]]:
            self._slots.begin_call()
            for name in CARRIED_ARGUMENTS:
                if name in arguments:
                    tree[name] = self._slots.place(name, arguments[name])
            options = arguments.get("transformer_options") or {}
            tree["transformer_options"] = {
                name: self._slots.place(name, options[name])
                for name in CARRIED_OPTIONS
                if name in options
            }
            return self._slot_messages()

        is_proved = False

        def prove() -> None:
            nonlocal is_proved
            is_proved = self._slots.prove()

        while not is_proved:
            try:
                replies = self._pool.request(
                    lambda number: Forward(
                        request=number,
                        model=known.number,
                        batch_degree=plan.batch_degree,
                        ulysses_degree=plan.ulysses_degree,
                        arguments=tree,
                        result=result.number,
                    ),
                    poll=poll,
                    prepare=prepare,
                    meanwhile=prove,
                )
            finally:
                self._close_fds()
        self._count(replies)
        self._totals.bytes_to_workers += self._slots.bytes_written - written
        self._totals.bytes_to_workers += self._pool.control_bytes - control
        first = replies[0]
        assert isinstance(first, Done)
        shared = result.view(getattr(torch, first.dtype), first.shape)
        return torch.empty_like(shared, device=x.device).copy_(shared)

    def _follow_generation(self) -> None:
        """New workers know no slots: begin with none."""
        if self._generation != self._pool.generation:
            self._generation = self._pool.generation
            self._fds = self._slots.take_created()
            self._close_fds()
            self._slots = SlotTable()
            self.loaded = None

    def _slot_messages(self) -> list[tuple[Message, int | None]]:
        self._fds = self._slots.take_created()
        messages: list[tuple[Message, int | None]] = [
            (Map(slot.number, slot.size_bytes), fd) for slot, fd in self._fds
        ]
        dropped = self._slots.take_dropped()
        if dropped:
            messages.append((Unmap(dropped), None))
        return messages

    def _close_fds(self) -> None:
        for _, fd in self._fds:
            os.close(fd)
        self._fds = ()

    def _count(self, replies: Sequence[Any]) -> None:
        for rank, reply in enumerate(replies):
            self._totals.num_forwards[rank] = reply.num_forwards
            self._totals.step_seconds[rank] = reply.seconds
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
            self._totals.bytes_from_workers += reply.bytes_written


def _no_poll() -> None:
    """Wait without looking for an interrupt: nothing is being sampled."""

"""One rank's share of calls: of models, of ControlNets, of single blocks, and of pictures.

Runs in: worker process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.messages.replies import (
    Controlled,
    Declined,
    Done,
    Fetched,
    FloatDtype,
    NoRoom,
    Raised,
    Ran,
    Unloaded,
)
from comfy_xdit_patch.wire.messages.requests import (
    Control,
    Decode,
    Fetch,
    Forget,
    Forward,
    Free,
    RunBlock,
    Tree,
)
from comfy_xdit_patch.wire.slots import SlotMap
from comfy_xdit_patch.wire.tensors import dtype_name, is_finite
from comfy_xdit_patch.worker.answering import answer
from comfy_xdit_patch.worker.decode.decoders import Decoders, OtherDecoderError
from comfy_xdit_patch.worker.forward import forward_share
from comfy_xdit_patch.worker.pipefusion.kept_keys import StreamKeys
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.room import no_room_for
from comfy_xdit_patch.worker.shard.blocks import DrivenBlocks
from comfy_xdit_patch.worker.shard.captured_forwards import Outcome, places_of
from comfy_xdit_patch.worker.shard.controlnet import control_share
from comfy_xdit_patch.worker.shard.node_patches import ModelPatches, Objects, PatchRefusedError
from comfy_xdit_patch.worker.shard.residuals import Residuals
from comfy_xdit_patch.worker.weights.resident import Resident
from comfy_xdit_patch.worker.weights.residents import Residents

Call: TypeAlias = Forward | Control | RunBlock | Fetch | Decode
KEPT = "kept residuals"
"""Beside the arguments of a call that may be a graph: those that its recipes refer to."""
Answer: TypeAlias = Done | NoRoom | Controlled | Ran | Fetched | Declined | Raised


class _Times(NamedTuple):
    """How long this rank was busy with a forward, and with which; 0 for none."""

    request: int = 0
    busy_s: float = 0.0
    is_launch_bound: bool = False


class Calls:
    """What a rank computes with the models that it holds, and what it keeps between calls."""

    def __init__(self, *, groups: Groups, slots: SlotMap, residents: Residents) -> None:
        self._groups = groups
        self._slots = slots
        self._residents = residents
        self._residuals = Residuals()
        self._objects = Objects()
        self._driven = DrivenBlocks(groups)
        self._streams = StreamKeys()
        self._decoders = Decoders(slots, groups)
        self._num_forwards = 0
        self._model: int | None = None
        """Of the call before, if that was a forward and nobody looked for room."""
        self._times = _Times()
        self._unread: tuple[int, Callable[[], float]] | None = None
        """The request that was computed last, and what tells its busy seconds."""

    def compute(self, message: Call) -> Answer:
        """Compute this rank's share of a call. Collective: every rank gets the same message.

        Raises:
            Exception: what the call raised, where this rank cannot know that it is well.
        """
        begun = collectives.num_begun()
        captured = self._residents.captured
        model = None
        if isinstance(message, Forward) and not message.working_bytes:
            model = message.model
        if model is None or model != self._model:
            captured.look_again()  # Whatever is placed or made room for now is each rank's own.
        self._model = model
        try:
            if not isinstance(message, Fetch):
                no_room = no_room_for(message, self._groups.device, captured.drop)
                if no_room is not None:
                    return no_room
            if isinstance(message, Forward):
                return self.forward(message)
            if isinstance(message, Control):
                return self.control(message)
            if isinstance(message, RunBlock):
                return self.run_block(message)
            if isinstance(message, Decode):
                return self.decode(message)
            return self.fetch(message)
        except (PatchRefusedError, OtherDecoderError) as error:
            if self._groups.device.type == "cuda":
                torch.cuda.synchronize()  # Arguments may be on their way from slots.
            return Declined(message.request, str(error))
        except Exception as error:  # noqa: BLE001 - whatever ComfyUI's code raises; see the module
            return answer(
                error,
                message,
                num_exchanges=collectives.num_begun() - begun,
                residents=self._residents,
                groups=self._groups,
            )

    def forward(self, message: Forward) -> Done:
        """Compute this rank's share of a call and write its rows to the result slot.

        Collective: every rank gets the same message.
        """
        start = time.perf_counter()
        collectives.clock.start(self._groups.device)
        resident = self._resident(message.model)
        plan = ParallelPlan.of_grid(message.grid, message.weights)
        arguments = self._slots.fetch(message.arguments, waits=False)
        patches = self._patches(message.patches)
        rank = self._groups.rank
        # What all ranks share they exchange at once, and stages run different blocks.
        assert resident.is_whole or resident.tensor or plan.pipefusion == 1
        # A CPU rank's transfers take the time of the core that would compute meanwhile.
        overlaps = message.overlaps and self._groups.device.type != "cpu"
        batch = arguments["x"].shape[0]
        asked = message.compiled
        obstacle = None if asked is None else resident.why_uncompiled(patches)
        of_blocks = resident.compiled.of(resident.flux, asked, obstacle, resident.enter)
        is_compiled = asked is not None and obstacle is None
        away = resident.later.away() if is_compiled else nullcontext()

        def share(given: Mapping[str, Any]) -> tuple[torch.Tensor, int]:
            arguments = dict(given)
            kept = arguments.pop(KEPT, None)
            sent = resident.begin(plan, self._groups, num_rows=batch)
            if resident.blocks is not None:
                resident.blocks.prefetch_first()
            rows, bytes_sent = forward_share(
                resident.flux,
                arguments,
                plan=plan,
                groups=self._groups,
                scaled=resident.scaled_in_place,
                residuals=self._residuals if kept is None else Residuals.of(kept),
                patches=patches,
                streams=self._streams,
                later=resident.later if overlaps else None,
                pipeline=message.pipeline,
            )
            return rows, bytes_sent + resident.bytes_moved - sent

        with torch.inference_mode(), away, of_blocks as compiled:
            outcome = self._captured(message, resident, patches, arguments, share)
            rows = outcome.rows
            collectives.clock.launched()
            shape = (batch, *rows.shape[1:])
            bytes_written, has_image = 0, True
            if plan.writes_rows(rank):
                first, end = plan.batch_rows(rank, batch)
                result = self._slots[message.result]
                is_direct = rows.is_cuda and result.is_registered
                written = result.view(rows.dtype, shape)[first:end]
                written.copy_(rows, non_blocking=is_direct)  # The clock's stop waits for it.
                bytes_written, has_image = rows.nbytes, is_finite(rows)
        self._num_forwards += 1
        self._unread = message.request, collectives.clock.halt(is_copied_out=True)
        if self._groups.device.type == "cpu":
            self.read_times()
        return Done(
            request=message.request,
            num_forwards=self._num_forwards,
            dtype=_dtype_name(rows.dtype),
            shape=shape,
            seconds=time.perf_counter() - start,
            bytes_between_ranks=outcome.bytes_sent,
            bytes_written=bytes_written,
            busy_seconds=self._times.busy_s,
            is_launch_bound=self._times.is_launch_bound,
            is_finite=has_image,
            timed=self._times.request,
            num_compiled=compiled.num_compiled,
            num_graphs=compiled.num_graphs,
            uncompiled=compiled.reason,
            is_replayed=outcome.is_replayed,
            has_captured=outcome.has_captured,
            uncaptured=outcome.reason,
        )

    def _captured(
        self,
        message: Forward,
        resident: Resident,
        patches: ModelPatches | None,
        arguments: Mapping[str, Any],
        share: Callable[[Mapping[str, Any]], tuple[torch.Tensor, int]],
    ) -> Outcome:
        """Compute a share by a CUDA graph, if that is wanted and can be."""
        captured, device = self._residents.captured, self._groups.device
        if not message.captures:
            captured.drop()
            return Outcome(*share(arguments))
        obstacle = resident.why_uncaptured(message, patches, device)
        if obstacle is not None:
            return Outcome(*share(arguments), reason=obstacle.reason)
        given = dict(arguments)
        if given.get("control") is not None:
            given["control"], given[KEPT] = self._residuals.numbered(given["control"])
        return captured.compute(
            share,
            given,
            model=message.model,
            how=(*message.grid, *message.weights, message.overlaps),
            places=partial(places_of, resident.flux, device),
        )

    def read_times(self) -> None:
        """Read how long the last call took, which is said with the next answer.

        On GPUs after the answer to that call: the host waits for nothing else.
        """
        if self._unread is not None:
            (request, busy_s), self._unread = self._unread, None
            self._times = _Times(request, busy_s(), collectives.clock.is_launch_bound)

    def control(self, message: Control) -> Controlled:
        """Compute this rank's tokens of a ControlNet's residuals, and keep them.

        Collective: every rank gets the same message.
        """
        start = time.perf_counter()
        resident = self._resident(message.model)
        plan = ParallelPlan.of_grid(message.grid, message.weights)
        arguments = self._slots.fetch(message.arguments)
        with torch.inference_mode():
            sent = resident.begin(plan, self._groups, num_rows=arguments["x"].shape[0])
            layout, residuals, bytes_sent = control_share(
                resident.flux, arguments, plan=plan, groups=self._groups
            )
            bytes_sent += resident.bytes_moved - sent
        self._residuals.keep(message.call, residuals)
        num_rows, features = arguments["x"].shape[0], residuals.tensors[0].shape[-1]
        return Controlled(
            request=message.request,
            layout=layout,
            dtype=_dtype_name(residuals.tensors[0].dtype),
            shape=(num_rows, sum(residuals.image), features),
            seconds=time.perf_counter() - start,
            bytes_between_ranks=bytes_sent,
        )

    def free(self, message: Free) -> Unloaded:
        """Free what PipeFusion kept for streams that are over."""
        self._streams.forget(message.streams)
        return Unloaded(message.request)

    def forget(self, message: Forget) -> None:
        """Free what the host does not refer to any more."""
        self._residuals.forget(message.calls)
        self._objects.forget(message.objects)
        self._driven.forget(message.tokens)

    def run_block(self, message: RunBlock) -> Ran:
        """Compute this rank's share of one block, and keep it. Collective."""
        start = time.perf_counter()
        collectives.clock.start(self._groups.device)
        resident = self._resident(message.model)
        plan = ParallelPlan.of_grid(message.grid, message.weights)
        with torch.inference_mode():
            # All ranks have all rows: these blocks' plans share tokens only.
            sent = resident.begin(plan, self._groups, num_rows=1, is_driven=True)
            _, bytes_sent = self._driven.run(
                resident.flux.get_submodule(message.block),
                self._slots.fetch(message.arguments),
                plan=plan,
                shares=plan.shares_of_counts(
                    self._groups.rank, message.counts, num_heads=resident.flux.num_heads
                ),
                scaled={
                    name: layer
                    for name, layer in resident.scaled_in_place.items()
                    if name.startswith(f"{message.block}.")
                },
                patches=self._patches(message.patches),
                keep=message.keep,
            )
            bytes_sent += resident.bytes_moved - sent
        self._num_forwards += message.is_first
        busy_s = collectives.clock.stop(is_copied_out=False)
        seconds = time.perf_counter() - start
        return Ran(message.request, self._num_forwards, seconds, bytes_sent, busy_s)

    def fetch(self, message: Fetch) -> Fetched:
        """Gather tokens that the ranks keep; the first one writes them. Collective."""
        plan = ParallelPlan.of_grid(message.grid, message.weights)
        flux = self._resident(message.model).flux
        shares = plan.shares_of_counts(self._groups.rank, message.counts, num_heads=flux.num_heads)
        with torch.inference_mode():
            tokens, bytes_sent = self._driven.fetch(message.tokens, message.stream, shares)
            if self._groups.rank == 0:
                self._slots[message.result].view(tokens.dtype, tuple(tokens.shape)).copy_(tokens)
        return Fetched(message.request, bytes_sent)

    def decode(self, message: Decode) -> Done:
        """Decode this rank's part of a picture, and write it to the result slot. Collective."""
        start = time.perf_counter()
        collectives.clock.start(self._groups.device)
        latent = self._slots.fetch(message.latent)
        with torch.inference_mode():
            decode = self._decoders.decode_tiles if message.owners else self._decoders.decode
            decoded = decode(message, latent)
            collectives.clock.launched()
            whole = self._slots[message.result].view(decoded.dtype, decoded.shape)
            for first, part in decoded.parts:
                whole.narrow(decoded.dim, first, part.shape[decoded.dim]).copy_(part)
        busy_s = collectives.clock.stop(is_copied_out=True)
        if self._groups.device.type == "cuda":
            torch.cuda.empty_cache()  # A picture takes gigabytes, and ComfyUI is next.
        return Done(
            request=message.request,
            num_forwards=self._num_forwards,
            dtype=_dtype_name(decoded.dtype),
            shape=decoded.shape,
            seconds=time.perf_counter() - start,
            bytes_between_ranks=decoded.bytes_sent,
            bytes_written=sum(part.nbytes for _, part in decoded.parts),
            busy_seconds=busy_s,
            is_launch_bound=collectives.clock.is_launch_bound,
            is_finite=all(is_finite(part) for _, part in decoded.parts),
        )

    def forget_decoder(self) -> None:
        """Forget the VAE decoder that was used last."""
        self._decoders.forget()

    def _patches(self, tree: Tree) -> ModelPatches | None:
        if tree is None:
            return None
        options = self._slots.fetch(tree["options"])
        return ModelPatches({**tree, "options": options}, self._objects)

    def _resident(self, model: int) -> Resident:
        with torch.inference_mode():  # ComfyUI may have taken the model off, and patches it again.
            resident = self._residents.get(model)
        if resident is None:
            raise WorkerError(f"Model {model} is asked for and not held.")
        return resident


def _dtype_name(dtype: torch.dtype) -> FloatDtype:
    return cast(FloatDtype, dtype_name(dtype))

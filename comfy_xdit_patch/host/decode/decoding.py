"""Decide for each call of a VAE's decoder: on the workers, or as ComfyUI does.

Runs in: host process.

ComfyUI decodes on one GPU when the steps are done, and the others wait. What a rank computes of a
picture is in ``worker/decode/lines.py``. Pictures from 1024 x 1024 px on are shared, where the
ranks live and the decoder is ComfyUI's own; all else is left alone.

ComfyUI has made room for the whole picture on its own GPU by the time it calls the decoder
(``VAE.decode``). A rank that has not the room for its part says so before any of them begins, and
ComfyUI decodes alone: weights of the diffusion model stay where they are.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from comfy_xdit_patch.errors import (
    CallRaisedError,
    CardsFullError,
    DeclinedError,
    Refusal,
    Scope,
    WorkerError,
)
from comfy_xdit_patch.host.boundary import theirs
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.decode.decoder import CarriedDecoders, Decoder
from comfy_xdit_patch.host.pool.crew import Crew, Room
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.host.reading.arguments import check_grad
from comfy_xdit_patch.host.reading.eligibility import Pristine
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.outcome import is_finite, lost, result_of
from comfy_xdit_patch.host.weights.likeness import Likeness
from comfy_xdit_patch.host.weights.one_owner import SharedMemory
from comfy_xdit_patch.report.log import note_once, say
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.replies import Done
from comfy_xdit_patch.wire.messages.requests import Decode
from comfy_xdit_patch.wire.packs import NoRoomError
from comfy_xdit_patch.wire.tensors import ForeignTensorError

MIN_PIXELS = 1024 * 1024
CHANNELS = (16, 32)
"""Of the latents of FLUX.1 and FLUX.2, as their decoders get them."""
BYTES_A_PIXEL = 2178
"""Of one-byte values, what ComfyUI counts for a decoder's work (comfy/sd.py, VAE.__init__)."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NUM_TIMED = 2
"""Pictures of each way; the first warms up."""
TO_COMPARE = Refusal("it is compared with the workers", Scope.STEP)
ONE_IS_FASTER = Refusal("one GPU is faster for pictures of this size, as was measured", Scope.STEP)


class Pace:
    """Which way pictures of one kind go: both in turn at first, then the faster one."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, tuple[list[float], list[float]]] = {}

    def alone(self, kind: Hashable) -> Refusal | None:
        """Return why ComfyUI decodes the next picture, or None."""
        ranks, one = self._seconds.setdefault(kind, ([], []))
        if min(len(ranks), len(one)) < NUM_TIMED:
            return TO_COMPARE if len(one) < len(ranks) else None
        return ONE_IS_FASTER if min(one[1:]) < min(ranks[1:]) else None

    def took(self, kind: Hashable, seconds: float, *, is_one: bool) -> None:
        """Note what a picture took; those after the comparison tell nothing new."""
        times = self._seconds[kind][is_one]
        if len(times) < NUM_TIMED:
            times.append(seconds)


@dataclass(frozen=True, slots=True)
class Picture:
    """What a latent is decoded to."""

    shape: tuple[int, ...]
    """(B, 3, H, W)."""
    working_bytes: int
    """Of the rank that has most of it."""


class Decoding:
    """The workers, as a function from a latent to a picture."""

    def __init__(
        self,
        *,
        pool: Pool,
        pristine: Pristine,
        totals: Totals,
        memory: SharedMemory,
        measures: bool,
    ) -> None:
        """Prepare; ``measures`` is off for who wants the ranks whatever they take."""
        self._pool = pool
        self._pristine = pristine
        self._totals = totals
        self._memory = memory
        self._pace = Pace() if measures else None

    def decode(
        self, module: Any, arguments: Mapping[str, Any], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Decode one latent on the workers.

        Args:
            module: ComfyUI's ``Decoder``.
            arguments: those of its ``forward`` by name.
            compute: that forward with them.

        Returns:
            The picture (B, 3, H, W) on the latent's device, or None: the caller decodes.

        Raises:
            InterruptProcessingException: the user cancelled.
        """
        crew = self._pool.crew
        picture = None if crew is None else self._picture(crew, module, arguments)
        if crew is None or picture is None:
            return None
        latent = arguments["z"]
        kind = (weakref.ref(module), picture.shape, latent.dtype)
        alone = None if self._pace is None else self._pace.alone(kind)
        if alone is TO_COMPARE:
            assert self._pace is not None, "it compares"
            _finish(latent.device)
            start = time.perf_counter()
            out: torch.Tensor | None = theirs(compute)()
            _finish(latent.device)
            self._pace.took(kind, time.perf_counter() - start, is_one=True)
            self._totals.decodes_alone[alone.reason] += 1
            return out
        start = time.perf_counter()
        outcome = alone or self._decoded(crew, module, latent, picture)
        seconds = time.perf_counter() - start
        if isinstance(outcome, Refusal):
            out = theirs(compute)() if outcome.has_raised else None
            self._totals.decodes_alone[outcome.reason] += 1
            note_once(f"a picture is decoded on one GPU: {outcome.reason}")
            return out
        if self._pace is not None:
            self._pace.took(kind, seconds, is_one=False)
        self._totals.decodes_parallel += 1
        self._totals.decode_seconds = seconds
        *_, height, width = picture.shape
        say(
            f"xDiT: {width} x {height} px decoded on {crew.world_size} {crew.device_word}, "
            f"{seconds:.1f} s"
        )
        return outcome

    def _picture(self, crew: Crew, module: Any, arguments: Mapping[str, Any]) -> Picture | None:
        """Return what the ranks would decode a latent to; None for what is left alone."""
        latent = arguments["z"]
        if crew.world_size < 2 or len(arguments) > 1 or type(module) is not self._pristine.decoder:
            return None
        if not isinstance(latent, torch.Tensor) or latent.ndim != 4 or latent.dtype not in FLOATS:
            return None
        batch, channels, num_lines, width = latent.shape
        scale = 2 ** (module.num_resolutions - 1)
        is_large = num_lines * width * scale**2 >= MIN_PIXELS and num_lines >= crew.world_size
        is_cpu = crew.workers[0].device.is_cpu
        if not is_large or channels not in CHANNELS or (latent.device.type == "cpu") != is_cpu:
            return None
        most = batch * math.ceil(num_lines / crew.world_size) * width * scale**2
        return Picture(
            (batch, module.conv_out.out_channels, num_lines * scale, width * scale),
            0 if is_cpu else BYTES_A_PIXEL * most * latent.element_size(),
        )

    def _decoded(
        self, crew: Crew, module: Any, latent: torch.Tensor, picture: Picture
    ) -> torch.Tensor | Refusal:
        decoder = Decoder.of(module)
        if isinstance(decoder, Refusal):
            return decoder
        call = Call(module, decoder, {"x": latent}, Run())
        try:
            changes = [
                *check_grad(latent),
                *self._pristine.check_modules(module),
                *crew.of(Likeness).changes(crew, call),
            ]
            if changes:
                return changes[0]
            return self._computed(crew, call, decoder, picture)
        except (ForeignTensorError, NoRoomError) as error:
            return Refusal(f"the VAE has weights that cannot be carried: {error}", Scope.STEP)
        except CardsFullError:
            return Refusal("a card has no room for its part of the picture", Scope.STEP)
        except DeclinedError as error:
            return Refusal(f"a node set {error} of the VAE", Scope.STEP)
        except CallRaisedError as error:
            self._totals.failed(str(error))
            return Refusal(
                f"decoding raised {error.kind} on the workers", Scope.STEP, has_raised=True
            )
        except WorkerError as error:
            return lost(error, self._totals)

    def _computed(
        self, crew: Crew, call: Call, decoder: Decoder, picture: Picture
    ) -> torch.Tensor | Refusal:
        latent = call.arguments["x"]
        carried = crew.of(CarriedDecoders).of(crew, decoder, latent.dtype)
        slots = crew.slots
        with crew.turn(call.poll) as turn:
            written = slots.bytes_written
            tree = turn.put("latent.x", latent)  # a name that is always new: not compared
            result = slots.result_slot(math.prod(picture.shape) * torch.float32.itemsize)
            replies = turn.compute(
                Decode(
                    request=turn.number,
                    key=carried.key,
                    decoder=carried.arguments,
                    weights=carried.weights,
                    attributes=carried.attributes,
                    latent=tree,
                    result=result.number,
                ),
                room=Room(picture.working_bytes, lambda _: self._memory.empty_cache()),
            )
            out = result_of(replies, result, picture.shape, latent.device)
        self._totals.bytes_to_workers += slots.bytes_written - written
        for reply in replies:
            assert isinstance(reply, Done)
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
            self._totals.bytes_from_workers += reply.bytes_written
        if not is_finite(out):
            return Refusal("the workers' picture has NaN or infinity in it", Scope.STEP)
        return out


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Decide for each call of a VAE's decoder: on the workers, or as ComfyUI does.

Runs in: host process.

ComfyUI decodes on one GPU when the steps are done, and the others wait. What a rank computes of a
picture is in ``worker/decode/lines.py``. Pictures from 1024 x 1024 px on are shared, where the
ranks live and the decoder is ComfyUI's own; all else is left alone. Where ComfyUI decodes such a
picture in tiles (the node for it, or too little memory), a rank has whole tiles, and decodes them
as ComfyUI alone does. Tiles from 1024 x 1024 px on are shared as pictures are.

ComfyUI has made room for the whole picture on its own GPU by the time it calls the decoder
(``VAE.decode``). A rank that has not the room for its part says so before any of them begins, and
ComfyUI decodes alone: weights of the diffusion model stay where they are.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
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
from comfy_xdit_patch.host.decode.tiles import ELSEWHERE, ElsewhereError, Tiles, owners_of
from comfy_xdit_patch.host.pool.crew import Crew, Room
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.host.reading.arguments import check_grad
from comfy_xdit_patch.host.reading.eligibility import Pristine
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.outcome import lost, result_of
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
TILES_A_RANK = 8
"""That are decoded before ComfyUI's progress bar goes on."""
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
    """What a latent is decoded to, or tiles are, one behind the other."""

    latent: torch.Tensor | list[torch.Tensor]
    shape: tuple[int, ...]
    """(B, 3, H, W), or how many values."""
    working_bytes: int
    """Of the rank that has most of it."""
    owners: tuple[int, ...] = ()
    """The rank of each tile."""


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
        self.tiles: ContextVar[Tiles | None] = ContextVar("tiles", default=None)
        """Of the picture that ComfyUI decodes in tiles now."""

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
        tiles = self.tiles.get()
        if tiles is not None:
            return tiles.picture_of(module, arguments)
        crew, latent = self._pool.crew, arguments["z"]
        if crew is None or len(arguments) > 1 or getattr(latent, "ndim", 0) != 4:
            return None
        if not self._is_ours(crew, module, latent.dtype, latent.device):
            return None
        batch, _, num_lines, width = latent.shape
        scale = scale_of(module)
        if num_lines * width * scale**2 < MIN_PIXELS or num_lines < crew.world_size:
            return None
        most = batch * math.ceil(num_lines / crew.world_size) * width * scale**2
        picture = Picture(
            latent,
            (batch, module.conv_out.out_channels, num_lines * scale, width * scale),
            _working_bytes(crew, latent, most),
        )
        kind = (weakref.ref(module), picture.shape, latent.dtype)

        def on_ranks() -> tuple[torch.Tensor | None, Refusal | None]:
            outcome = self._decoded(crew, module, picture)
            return (None, outcome) if isinstance(outcome, Refusal) else (outcome, None)

        return self._faster(kind, crew, latent.device, on_ranks, compute)

    def decode_tiled(
        self, vae: Any, call: Mapping[str, Any], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Have the ranks decode tiles while ComfyUI decodes a latent in tiles.

        Args:
            vae: ComfyUI's ``VAE``.
            call: the arguments of its ``decode_tiled_`` by name.
            compute: that method with them.

        Returns:
            The picture (B, 3, H, W), or None: the caller decodes.

        Raises:
            InterruptProcessingException: the user cancelled.
        """
        crew = self._pool.crew
        module = getattr(vae.first_stage_model, "decoder", None)
        if crew is None or not self._is_ours(crew, module, vae.vae_dtype, vae.device):
            return None
        samples, sizes = call["samples"], (call["tile_x"], call["tile_y"], call["overlap"])
        pixels = vae.upscale_ratio**2
        if not sizes[0] * sizes[1] * pixels < MIN_PIXELS <= math.prod(samples.shape[2:]) * pixels:
            return None

        def on_ranks() -> tuple[torch.Tensor | None, Refusal | None]:
            decoder = Decoder.of(module)
            if isinstance(decoder, Refusal):
                return None, decoder
            tiles = Tiles(
                module,
                scale=scale_of(module),
                num_ahead=TILES_A_RANK * crew.world_size,
                decode=lambda latents: self._tiles_decoded(crew, module, latents),
            )
            token = self.tiles.set(tiles)
            try:
                compute()
                tiles.is_noting = False
                return theirs(compute)(), tiles.refusal
            except ElsewhereError:
                return None, ELSEWHERE
            finally:
                self.tiles.reset(token)

        kind = (weakref.ref(module), tuple(samples.shape), sizes, vae.vae_dtype)
        return self._faster(kind, crew, vae.device, on_ranks, compute, how=" in tiles")

    def _faster(
        self,
        kind: Hashable,
        crew: Crew,
        device: torch.device,
        on_ranks: Callable[[], tuple[torch.Tensor | None, Refusal | None]],
        compute: Callable[[], torch.Tensor],
        how: str = "",
    ) -> torch.Tensor | None:
        """Return the picture of the way that is faster, or is not known yet.

        Args:
            device: that ComfyUI decodes on.
            on_ranks: returns the picture, if it has one, and why ranks have not made all of it.
        """
        alone = None if self._pace is None else self._pace.alone(kind)
        if alone is TO_COMPARE:
            assert self._pace is not None, "it compares"
            _finish(device)
            start = time.perf_counter()
            out: torch.Tensor | None = theirs(compute)()
            _finish(device)
            self._pace.took(kind, time.perf_counter() - start, is_one=True)
            self._totals.decodes_alone[alone.reason] += 1
            return out
        start = time.perf_counter()
        out, refusal = (None, alone) if alone else on_ranks()
        seconds = time.perf_counter() - start
        if refusal is not None:
            if out is None and refusal.has_raised:
                out = theirs(compute)()
            self._totals.decodes_alone[refusal.reason] += 1
            note_once(f"a picture is decoded on one GPU: {refusal.reason}")
            return out
        assert out is not None, "made by the ranks"
        if self._pace is not None:
            self._pace.took(kind, seconds, is_one=False)
        self._totals.decodes_parallel += 1
        self._totals.decode_seconds = seconds
        *_, height, width = out.shape
        say(
            f"xDiT: {width} x {height} px decoded{how} on {crew.world_size} "
            f"{crew.device_word}, {seconds:.1f} s"
        )
        return out

    def _is_ours(self, crew: Crew, module: Any, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the ranks could decode what a decoder decodes, be it large or not."""
        return (
            crew.world_size > 1
            and type(module) is self._pristine.decoder
            and module.conv_in.in_channels in CHANNELS
            and dtype in FLOATS
            and (device.type == "cpu") == crew.workers[0].device.is_cpu
        )

    def _tiles_decoded(
        self, crew: Crew, module: Any, latents: list[torch.Tensor]
    ) -> list[torch.Tensor] | Refusal:
        scale, channels = scale_of(module), module.conv_out.out_channels
        shapes = [(len(z), channels, z.shape[2] * scale, z.shape[3] * scale) for z in latents]
        num_values = [math.prod(shape) for shape in shapes]
        picture = Picture(
            latents,
            (sum(num_values),),
            _working_bytes(crew, latents[0], max(num_values) // channels),
            tuple(owners_of(num_values, crew.world_size)),
        )
        out = self._decoded(crew, module, picture)
        if isinstance(out, Refusal):
            return out
        return [
            part.view(shape)
            for part, shape in zip(torch.split(out, num_values), shapes, strict=True)
        ]

    def _decoded(self, crew: Crew, module: Any, picture: Picture) -> torch.Tensor | Refusal:
        decoder = Decoder.of(module)
        if isinstance(decoder, Refusal):
            return decoder
        latent = picture.latent[0] if isinstance(picture.latent, list) else picture.latent
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
            tree = turn.put("latent.x", picture.latent)  # a name that is always new: not compared
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
                    owners=list(picture.owners),
                ),
                room=Room(picture.working_bytes, lambda _: self._memory.empty_cache()),
            )
            out = result_of(replies, result, picture.shape, latent.device)
        self._totals.bytes_to_workers += slots.bytes_written - written
        done = [reply for reply in replies if isinstance(reply, Done)]
        for reply in done:
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
            self._totals.bytes_from_workers += reply.bytes_written
        if not all(reply.is_finite for reply in done):
            return Refusal("the workers' picture has NaN or infinity in it", Scope.STEP)
        return out


def scale_of(module: Any) -> int:
    """Return how many pixels a decoder makes of one of its latent, in each direction."""
    scale: int = 2 ** (module.num_resolutions - 1)
    return scale


def _working_bytes(crew: Crew, latent: torch.Tensor, num_pixels: int) -> int:
    """Return what decoding takes on a card; 0 of CPU ranks, where nobody looks for it."""
    is_cpu = crew.workers[0].device.is_cpu
    return 0 if is_cpu else BYTES_A_PIXEL * num_pixels * latent.element_size()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

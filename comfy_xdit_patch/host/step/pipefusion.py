"""PipeFusion's part of a step: whether a run may use it, and which of its calls are exact.

Runs in: host process. Reads ComfyUI's objects, changes nothing.

PipeFusion is an approximation, and used only where the user named it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.run import Run, Stream, Streams
from comfy_xdit_patch.planning.family import member_of
from comfy_xdit_patch.planning.pipeline import MIN_STEPS, NUM_WARM_UP_CALLS, num_patches
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.messages.requests import Free, Tree

CONDITIONING = ("context", "y", "ref_latents", "ref_latents_method", "attention_mask")
"""Arguments that are the same in all calls of a stream. ``guidance`` may move like sigma."""


@dataclass(slots=True)
class PipelinedCall:
    """One call: which stream it belongs to, and whether it must be exact."""

    streams: Streams
    stream: Stream
    state: tuple[Any, ...]
    num_patches: int
    sigma: float
    schedule: Sequence[float]
    is_warm_up: bool = False

    def tree(self, arguments: Mapping[str, Tree]) -> Tree:
        """Say how the ranks compute it, once its arguments are in their slots. Counts the call."""
        # Slots know contents: a tensor that changed has another slot or version.
        conditioning = [repr(arguments.get(name)) for name in CONDITIONING]
        self.is_warm_up = self.streams.is_warm_up(
            self.stream,
            state=(*self.state, *conditioning, "control" in arguments),
            sigma=self.sigma,
            schedule=self.schedule,
        )
        return {
            "stream": self.stream.number,
            "is_warm_up": self.is_warm_up,
            "num_patches": self.num_patches,
        }


def _streams_of_runs(_: Crew) -> weakref.WeakKeyDictionary[Run, Streams]:
    """Streams for which the ranks may keep something."""
    return weakref.WeakKeyDictionary()


class Pipelines:
    """What PipeFusion needs of the host."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.num_patches: int | None = None
        """Set by measurements only."""
        self.num_warm_up_calls = NUM_WARM_UP_CALLS

    def refusal(self, call: Call, plan: ParallelPlan) -> Refusal | None:
        """Return why a call must not use PipeFusion, or None."""
        flux, options = call.module, call.options
        why = _why_whole(call)
        if why is not None:
            return Refusal(f"PipeFusion gives nodes no whole tokens, and {why}")
        if options.get("context_window") is not None:
            return Refusal("PipeFusion cannot follow a latent that is cut into windows")
        if member_of(flux).is_pixel_space:
            return Refusal("PipeFusion does not run models that work on pixels")
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            return Refusal("PipeFusion has to know the sigmas of the run")
        if len(sigmas) - 1 < MIN_STEPS:
            return Refusal(f"PipeFusion needs {MIN_STEPS} steps or more")
        num_blocks = len(flux.double_blocks) + len(flux.single_blocks)
        if plan.pipefusion > num_blocks:
            return Refusal(f"pipefusion={plan.pipefusion} is more than the {num_blocks} blocks")
        if not call.run.is_flux:
            return Refusal("PipeFusion has to know where a run begins and ends")
        return None

    def of_call(
        self, crew: Crew, call: Call, plan: ParallelPlan, model: tuple[int, str]
    ) -> PipelinedCall:
        """Return what decides about a call once its arguments are in their slots.

        Args:
            model: its number, and the key of its weights.
        """
        run, options = call.run, call.options
        patches_of_call = self.num_patches or num_patches(plan, call.workload)
        conds = tuple(str(options.get(name)) for name in ("cond_or_uncond", "uuids"))
        streams = crew.of(_streams_of_runs).setdefault(run, Streams(self.num_warm_up_calls))
        return PipelinedCall(
            streams=streams,
            stream=streams.of((model[0], *conds), next(self._numbers)),
            state=(
                plan,
                patches_of_call,
                model,
                repr(call.carried.tree),
                tuple(call.arguments["x"].shape),
                # A step that ComfyUI computed itself left no keys on the ranks.
                sum(run.counts.fall_backs.values()),
            ),
            num_patches=patches_of_call,
            sigma=float(options.get("sigmas", call.arguments["timestep"]).max()),
            schedule=options["sample_sigmas"].tolist(),
        )

    def end(self, crew: Crew, run: Run) -> None:
        """Free what the ranks keep for the streams of a run."""
        streams = crew.of(_streams_of_runs).pop(run, None)
        if streams is not None:
            with crew.turn(lambda: None) as turn:
                turn.ask(Free(turn.number, streams.numbers))


def _why_whole(call: Call) -> str | None:
    """Return which node needs all tokens at a time, or leaves out blocks."""
    if call.changes:
        return call.changes[0].reason
    carried = call.carried
    if carried.gathered is not None:
        return carried.gathered
    if carried.keeps_references:
        return "a node keeps the keys of references"
    tree = carried.tree
    if tree is not None and tree["skip"]:
        return "a node leaves out blocks"
    if tree is not None and tree["attention"] is not None and tree["attention"]["wants_order"]:
        return "a node chose the attention function"
    return None

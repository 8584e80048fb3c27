"""Meet calls of a FLUX model that need not come to ``_forward``, one step earlier.

Runs in: host process.

A node gives a model, or its class, a ``forward`` of its own; it may call ComfyUI's ``_forward``,
or parts of it, or the blocks alone. While ``BaseModel._apply_model`` runs such a model, its
``forward`` is ours, and runs the node's with the blocks on the workers
(``host/step/block_calls.py``). If the node's comes to ``_forward`` after all, the call is computed
and counted there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from comfy_xdit_patch.blame import origin
from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.boundary import attempt, our_faults_stay_ours
from comfy_xdit_patch.host.guest.host import Host
from comfy_xdit_patch.host.reading.compiled import original
from comfy_xdit_patch.host.reading.models import flux_of
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.outcome import Step
from comfy_xdit_patch.host.weights.holding import LOST
from comfy_xdit_patch.wire.own_attribute import own_attribute

FAULT = Refusal("a fault of comfy-xdit-patch, which is in the log", Scope.STEP)


@contextmanager
def met(host: Host, base_model: Any) -> Iterator[None]:
    """Have a model's ``forward`` be ours for one call, if a node put something in its way."""
    meeting: Any = nullcontext()
    with our_faults_stay_ours("meeting a call"):
        flux = flux_of(base_model)
        obstacle = host.pristine.ways.obstacle(flux)
        if obstacle is not None:
            meeting = own_attribute(flux, "forward", _forward_of(host, flux, obstacle))
    run = host.current_run.get()
    before = 0 if run is None else run.num_calls
    with meeting:
        yield
    with our_faults_stay_ours("a call that was not seen"):
        model = getattr(base_model, "diffusion_model", None)
        is_unseen = run is not None and run.is_flux and run.num_calls == before
        if is_unseen and host.pristine.ways.class_of(original(model)) is None:
            name = origin(model)
            host.refuse(Refusal(f"a node put {name} around the whole model", Scope.STEP))


@contextmanager
def watched(host: Host, guider: Any, run: Run | None, num_sigmas: int) -> Iterator[None]:
    """See calls of a run's model that do not come through ComfyUI's at all.

    A ``model_function_wrapper`` may call ``forward_orig`` or the blocks itself: the first block is
    watched. And where no call came in the whole run, that is said.
    """
    watching: Any = nullcontext()
    with our_faults_stay_ours("watching a run"):
        wrapper = (getattr(guider, "model_options", None) or {}).get("model_function_wrapper")
        if run is not None and run.is_flux and wrapper is not None:
            block = flux_of(guider.model_patcher.model).double_blocks[0]
            if original(block) is block:
                watching = own_attribute(block, "forward", _watched_block(host, block, wrapper))
    with watching:
        yield
    with our_faults_stay_ours("a run that was not seen"):
        is_sampled = run is not None and run.is_flux and num_sigmas > 1
        if run is not None and is_sampled and not (run.num_calls or run.counts.fall_backs):
            host.refuse(Refusal("FLUX was sampled, and none of its calls came here", Scope.STEP))


def _watched_block(host: Host, block: Any, wrapper: Any) -> Callable[..., Any]:
    theirs = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not host.is_inside.get():
            with our_faults_stay_ours("a block that was called by itself"):
                name = origin(wrapper)
                host.refuse(Refusal(f"a node calls FLUX's blocks itself: {name}", Scope.STEP))
        return theirs(*args, **kwargs)

    # No change of the block: whoever compares it with ComfyUI's finds that.
    forward.__func__ = getattr(theirs, "__func__", theirs)  # type: ignore[attr-defined]
    return forward


def _forward_of(host: Host, flux: Any, obstacle: Refusal) -> Callable[..., torch.Tensor]:
    theirs = flux.forward
    signature = host.pristine.ways.signature(flux)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = signature.bind(flux, *args, **kwargs)
        call.apply_defaults()
        named = dict(call.arguments)
        arguments = {**named, **named.pop("kwargs", {})}
        return _call(host, flux, arguments, lambda: theirs(*args, **kwargs), obstacle)

    return forward


def _call(
    host: Host,
    flux: Any,
    arguments: dict[str, Any],
    compute: Callable[[], torch.Tensor],
    obstacle: Refusal,
) -> torch.Tensor:
    run = host.current_run.get() or Run()
    token, inside = host.current_run.set(run), host.is_inside.set(True)
    before, begin = run.num_calls, time.perf_counter()
    try:
        run.is_around = run.refusal is None
        ours = attempt(lambda: host.attempt(flux, arguments, compute, run, obstacle=obstacle))
        outcome: Step | Refusal = FAULT if ours.fault is not None else ours.out
        run.is_around = outcome == LOST  # The run goes on alone, and so does the call within.
        if run.is_around:
            run.num_calls += 1
            host.counted(outcome, run, time.perf_counter() - begin)
        if isinstance(outcome, Refusal):
            host.hooks.make_up()
            out = compute()
        else:
            out = outcome.out
        if ours.fault is not None:
            with our_faults_stay_ours("a call around a step", strict=host.settings.strict):
                raise ours.fault
        if run.num_calls == before:
            run.num_calls += 1
            host.counted(outcome, run, time.perf_counter() - begin)
        return out
    finally:
        run.is_around = False
        host.is_inside.reset(inside)
        host.current_run.reset(token)

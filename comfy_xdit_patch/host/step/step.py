"""Run one call of a FLUX model on the workers, in the way that its graph allows.

Runs in: host process.

    whole      the workers run ComfyUI's forward, with the patches that they can be given
    gathered   what nodes put around the blocks runs here, the blocks run on the workers
    refused    with a reason; the caller runs ComfyUI's forward here
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.errors import (
    CallRaisedError,
    Refusal,
    Scope,
    WorkerError,
    XditError,
)
from comfy_xdit_patch.host.boundary import theirs
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pace.auto import Auto
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.reading.arguments import check_arguments, check_grad, misplaced
from comfy_xdit_patch.host.reading.compiled import as_compiled, original
from comfy_xdit_patch.host.reading.eligibility import Pristine, check_patcher
from comfy_xdit_patch.host.reading.models import KnownModel, flux_of
from comfy_xdit_patch.host.reading.node_patches import carry
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.block_calls import DrivenForward
from comfy_xdit_patch.host.step.call_plans import CallPlan, CallPlans
from comfy_xdit_patch.host.step.outcome import Computed, Step, checked, lost, refusal_of
from comfy_xdit_patch.host.step.pipefusion import Pipelines
from comfy_xdit_patch.host.step.whole_call import RemoteForward
from comfy_xdit_patch.host.weights.holding import Holding
from comfy_xdit_patch.host.weights.likeness import Likeness
from comfy_xdit_patch.host.weights.one_owner import LeftOutHooks
from comfy_xdit_patch.planning.transfers import TransferDtype
from comfy_xdit_patch.report.log import note_once
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.values import UncarriedValueError

Learn = Callable[..., None]
"""``CrewBalance.measured`` for one call; takes its times."""


class _Untimed:
    """What is to be learned from the last call's times: on GPUs the next answer has them."""

    def __init__(self, _: Crew) -> None:
        self._last: tuple[int, Learn | None] = 0, None

    def note(self, computed: Computed, learn: Learn | None) -> None:
        """Note a call, and learn from the times that its answer brought."""
        timed = computed.timed_of(learn, self._last)
        self._last = computed.request, learn
        if timed is not None:
            timed(computed.busy_s, is_launch_bound=computed.is_launch_bound)


class ParallelSteps:
    """The workers, as a function from a call to its result or a refusal."""

    def __init__(
        self,
        remote: RemoteForward,
        driven: DrivenForward,
        *,
        holding: Holding,
        pristine: Pristine,
        totals: Totals,
        hooks: LeftOutHooks,
        auto: Auto,
        pipelines: Pipelines,
        transfer_dtype: TransferDtype,
    ) -> None:
        self._auto = auto
        self._plans = CallPlans(holding, auto=auto, pipelines=pipelines)
        self._remote = remote
        self._driven = driven
        self._holding = holding
        self._pristine = pristine
        self._totals = totals
        self._hooks = hooks
        self._pipelines = pipelines
        self._transfer_dtype: TransferDtype = transfer_dtype
        self._numbers = itertools.count(1)

    def run(
        self,
        flux: Any,
        arguments: Mapping[str, Any],
        compute: Callable[[], torch.Tensor],
        base_model: Any,
        run: Run,
        *,
        obstacle: Refusal | None = None,
        is_inner: bool = False,
    ) -> Step | Refusal:
        """Compute one call on the workers.

        Args:
            arguments: the arguments of ``Flux._forward`` by name.
            compute: ComfyUI's own forward with them.
            base_model: ComfyUI's ``BaseModel`` around the model, or None.
            obstacle: why this is a call of ``forward``, and need not come to ``_forward``.
            is_inner: such a call lies around this one; see ``Call``.

        Raises:
            InterruptProcessingException: the user cancelled.
        """
        call = self._read(flux, arguments, base_model, run, obstacle, is_inner=is_inner)
        if isinstance(call, Refusal):
            return call
        if call.refusal is not None:
            return call.refusal
        crew = self._holding.come_up(call)
        if isinstance(crew, Refusal):
            return crew
        try:
            call.changes += crew.of(Likeness).changes(crew, call)
            if call.refusal is not None:
                return call.refusal
            planned = self._plans.of_call(crew, call)
            if isinstance(planned, Refusal):
                return planned
            known = self._holding.hold(crew, call, planned.plan)
            if isinstance(known, Refusal):
                if not known.is_around_blocks:
                    return known
                # Only what the ranks built told it. It is known now, and their blocks can run.
                return self.run(
                    *(flux, arguments, compute, base_model, run),
                    obstacle=obstacle,
                    is_inner=is_inner,
                )
            if planned.kind is not None and planned.kind.is_one:
                self._hooks.make_up()
                one = theirs(as_compiled(base_model, compute))
                alone = self._auto.time_one(planned.kind, one, arguments["x"].device)
                return Step(alone, is_one=True)
            step = self._computed(crew, call, planned, known, compute)
            if self._holding.has_changed_file(run):
                return Refusal("the model's file was changed during this step", Scope.STEP)
            return crew.of(Likeness).late_change(crew) or checked(step)
        except (XditError, UncarriedValueError) as error:
            refusal = refusal_of(error, self._totals)
            if refusal is None:
                raise
            if isinstance(error, CallRaisedError):
                self._holding.forget_what_is_held(crew)
            return refusal

    def _read(
        self,
        flux: Any,
        arguments: Mapping[str, Any],
        base_model: Any,
        run: Run,
        obstacle: Refusal | None,
        *,
        is_inner: bool,
    ) -> Call | Refusal:
        """Read what decides about a call, but for what only the workers can tell."""
        # A compiled model stands in for the module it was made from.
        own = getattr(base_model, "diffusion_model", None)
        if flux is not original(own):
            return Refusal("FLUX was called outside ComfyUI's sampling", Scope.STEP)
        refusal = misplaced(arguments)
        if refusal is not None:
            return refusal
        carried = carry(
            arguments.get("transformer_options") or {},
            reads=partial(self._pristine.reads, flux),
            numbers=partial(self._number_of, run),
        )
        changes = [
            *([] if obstacle is None else [obstacle]),
            *self._pristine.check_step(flux),
            *check_patcher(base_model, self._pristine.bypass),
            *check_arguments(arguments),
            *check_grad(arguments["x"]),
            *carried.refusals,
            *self._holding.changes(base_model, run),
        ]
        return Call(flux, base_model, arguments, run, carried, changes, is_inner)

    def _computed(
        self,
        crew: Crew,
        call: Call,
        planned: CallPlan,
        known: KnownModel,
        compute: Callable[[], torch.Tensor],
    ) -> Step:
        """Compute a call on workers that hold its model: as a whole, or its blocks."""
        plan, run = planned.plan, call.run
        room = self._holding.room_for(crew, call, known, plan)
        pipeline = None
        if call.changes:
            run.needs_residuals = True
            self._hooks.make_up()  # What lies around the blocks runs here.
            computed = self._driven.run(crew, known.number, call, plan, compute, room=room)
            gathered_for: str | None = call.changes[0].reason
        else:
            if plan.pipefusion > 1:
                model = known.number, self._holding.state_key(crew, known)
                pipeline = self._pipelines.of_call(crew, call, plan, model)
            computed = self._remote.forward(
                crew, known.number, call, plan, pipeline=pipeline, room=room
            )
            run.counts.warm_ups += pipeline is not None and pipeline.is_warm_up
            gathered_for = call.carried.gathered
        is_refused = isinstance(call.compiled, Refusal)
        for reason in (call.compiled.reason,) if is_refused else computed.uncompiled:
            note_once(f"blocks of a compiled model run as they are: {reason}")
        for reason in computed.uncaptured:
            note_once(f"steps run without a CUDA graph: {reason}")
        run.counts.plan = self._totals.last_plan = plan
        if plan.exchanges_heads:
            run.counts.transfer_dtype = self._transfer_dtype
        elif self._transfer_dtype != "exact":
            note_once(f"XDIT_TRANSFER_DTYPE changes nothing with {plan.name}")
        balance = crew.of(self._holding.balance)
        learn: Learn | None = None
        if not (computed.is_empty or computed.is_in_making):
            learn = partial(
                balance.measured,
                plan,
                call.workload,
                model=known.number,
                replan=planned.replan,
            )
        crew.of(_Untimed).note(computed, learn)
        # Even shares of unequal ranks say nothing about those to come.
        tells = not (call.changes or computed.is_in_making) and balance.is_at_rest
        return Step(
            computed.out,
            gathered_for=gathered_for,
            is_finite=computed.is_finite,
            is_empty=computed.is_empty,
            kind=planned.kind if tells else None,
        )

    def end(self, run: Run) -> None:
        """Have the ranks free what they keep for a run."""
        crew = self._holding.crew
        if crew is None:
            return
        crew.gone.objects.extend(number for _, number in run.objects.values())
        try:
            self._pipelines.end(crew, run)
        except WorkerError as error:
            lost(error, self._totals)

    def reaches_us(self, base_model: Any) -> bool:
        """Whether a model's next call comes here as a whole, for all that can be seen now."""
        flux = flux_of(base_model)
        return not (
            self._pristine.check_step(flux)
            or check_patcher(base_model, self._pristine.bypass)
            or self._pristine.ways.obstacle(flux)
        )

    def _number_of(self, run: Run, thing: Any) -> int:
        if id(thing) not in run.objects:
            run.objects[id(thing)] = thing, next(self._numbers)
        return run.objects[id(thing)][1]

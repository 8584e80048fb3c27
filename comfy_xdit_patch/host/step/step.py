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
from comfy_xdit_patch.host.pace.auto import Auto
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.reading.arguments import check_arguments, check_grad, misplaced
from comfy_xdit_patch.host.reading.eligibility import Pristine, blocking, check_patcher
from comfy_xdit_patch.host.reading.models import flux_of
from comfy_xdit_patch.host.reading.node_patches import carry, other_options
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.block_calls import DrivenForward
from comfy_xdit_patch.host.step.call_plans import CallPlans
from comfy_xdit_patch.host.step.outcome import Step, checked, lost, refusal_of
from comfy_xdit_patch.host.step.pipefusion import Pipelines
from comfy_xdit_patch.host.step.whole_call import RemoteForward, arguments_of
from comfy_xdit_patch.host.weights.holding import Holding
from comfy_xdit_patch.host.weights.likeness import Likeness
from comfy_xdit_patch.host.weights.one_owner import LeftOutHooks
from comfy_xdit_patch.planning.family import num_out_channels
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.slots import UncarriedArgumentError


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
            is_inner: such a call lies around this one, and its blocks run on the workers already:
                all of it does, or nothing is done here.

        Raises:
            InterruptProcessingException: the user cancelled.
        """
        import comfy.model_management

        poll = comfy.model_management.throw_exception_if_processing_interrupted
        # A compiled model stands in for the module it was made from.
        own = getattr(base_model, "diffusion_model", None)
        if flux not in (own, getattr(own, "_orig_mod", None)):
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
        refusal = blocking(changes, any_of_them=is_inner)
        if refusal is not None:
            return refusal
        crew = self._holding.come_up(base_model, poll)
        if isinstance(crew, Refusal):
            return crew
        try:
            changes += crew.of(Likeness).changes(crew, base_model, run, poll)
        except WorkerError as error:
            return lost(error, self._totals)
        refusal = blocking(changes, any_of_them=is_inner)
        if refusal is not None:
            return refusal
        call = self._plans.of_call(
            crew, flux, arguments, base_model, run, changes=changes, carried=carried, poll=poll
        )
        if isinstance(call, Refusal):
            return call
        plan, workload, kind = call.plan, call.workload, call.kind
        balance = crew.of(self._holding.balance)
        try:
            known = self._holding.hold(
                crew,
                base_model,
                run,
                workload=workload,
                plan=plan,
                dtype=arguments["x"].dtype,
                poll=poll,
                is_gathered=bool(changes),
            )
            if isinstance(known, Refusal) and known.is_around_blocks:
                # Only what the ranks built told it. It is known now, and their blocks can run.
                return self.run(
                    *(flux, arguments, compute, base_model, run),
                    obstacle=obstacle,
                    is_inner=is_inner,
                )
            if isinstance(known, Refusal):
                return known
            if kind is not None and kind.is_one:
                self._hooks.make_up()
                return Step(
                    self._auto.time_one(kind, theirs(compute), arguments["x"].device), is_one=True
                )
            room = self._holding.room_for(crew, base_model, run, known, plan, workload)
            if not changes:
                pipeline = None
                if plan.pipefusion > 1:
                    pipeline = self._pipelines.of_call(
                        crew,
                        run,
                        arguments,
                        plan=plan,
                        workload=workload,
                        model=(known.number, self._holding.state_key(crew, known)),
                        patches=carried.tree,
                    )
                computed = self._remote.forward(
                    crew,
                    known.number,
                    arguments_of(flux, arguments),
                    plan=plan,
                    patches=carried.tree,
                    out_channels=num_out_channels(flux, arguments["x"].shape[1]),
                    poll=poll,
                    pipeline=pipeline,
                    room=room,
                )
                run.counts.plan = plan
                balance.measured(
                    plan,
                    workload,
                    computed.busy_s,
                    is_launch_bound=computed.is_launch_bound,
                    model=known.number,
                    replan=call.replan,
                )
                run.counts.warm_ups += pipeline is not None and pipeline.is_warm_up
                if not balance.is_at_rest:
                    kind = None  # Even shares of unequal ranks say nothing about those to come.
                step = Step(computed.out, gathered_for=carried.gathered, kind=kind)
                return self._checked(step, crew, run)
            run.needs_residuals = True
            self._hooks.make_up()  # What lies around the blocks runs here.
            driven = self._driven.run(
                crew,
                flux,
                compute,
                model=known.number,
                plan=plan,
                num_image_tokens=workload.num_image_tokens,
                patches=carried.in_blocks(),
                carry_options=other_options,
                poll=poll,
                room=room,
            )
            run.counts.plan = plan
            if driven.num_blocks:
                balance.measured(
                    plan, workload, driven.busy_s, model=known.number, replan=call.replan
                )
            is_empty = driven.num_blocks == 0
            step = Step(driven.out, gathered_for=changes[0].reason, is_empty=is_empty)
            return self._checked(step, crew, run)
        except (XditError, UncarriedArgumentError) as error:
            refusal = refusal_of(error, self._totals)
            if refusal is None:
                raise
            if isinstance(error, CallRaisedError):
                self._holding.forget_what_is_held(crew)
            return refusal

    def _checked(self, step: Step, crew: Crew, run: Run) -> Step | Refusal:
        if self._holding.has_changed_file(run):
            return Refusal("the model's file was changed during this step", Scope.STEP)
        return crew.of(Likeness).late_change(crew) or checked(step)

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

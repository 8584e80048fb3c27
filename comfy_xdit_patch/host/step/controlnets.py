"""Decide for each call of a ControlNet: on the workers, where its residuals are needed, or here.

Runs in: host process.

A ControlNet that runs on one GPU keeps all others waiting, and its residuals have to be carried to
them in every step. On the same ranks as the model it takes its share of the time, and each rank
has just the residuals of its own tokens. Where that is not possible the ControlNet runs here as
ever, and only its residuals are carried: the step itself stays parallel.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.errors import CallRaisedError, CardsFullError, Refusal, Scope, WorkerError
from comfy_xdit_patch.host.boundary import theirs
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pace.auto import ONE_IS_FASTER, Auto
from comfy_xdit_patch.host.pool.crew import Crew, Room
from comfy_xdit_patch.host.reading.arguments import check_grad
from comfy_xdit_patch.host.reading.eligibility import Pristine
from comfy_xdit_patch.host.reading.limits import no_ring
from comfy_xdit_patch.host.reading.models import ModelRegistry, flux_of
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.outcome import lost
from comfy_xdit_patch.host.step.residuals_there import (
    ControlCall,
    DeferredResidual,
    Residuals,
    calls_kept,
)
from comfy_xdit_patch.host.weights.holding import Holding
from comfy_xdit_patch.host.weights.likeness import Likeness
from comfy_xdit_patch.host.weights.one_owner import SharedMemory
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.planner import plan_call
from comfy_xdit_patch.planning.strategy import parse_strategy
from comfy_xdit_patch.planning.verdict import ONE
from comfy_xdit_patch.report.log import note_once
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.answers import check_shape
from comfy_xdit_patch.wire.messages.replies import Controlled
from comfy_xdit_patch.wire.messages.requests import Control
from comfy_xdit_patch.wire.values import UncarriedValueError

LOADER = "load_controlnet"


# Other keyword arguments are swallowed by ``ControlNetFlux.forward`` unread.
CARRIED_ARGUMENTS = ("x", "timesteps", "context", "y", "guidance", "hint", "control_type")


class ControlModel:
    """A ControlNet's module as the rest of this package sees a model. Keeps nothing alive."""

    def __init__(self, control: Any) -> None:
        self._net = weakref.ref(control.control_model)
        self._patcher = weakref.ref(control.control_model_wrapped)
        self.manual_cast_dtype: torch.dtype | None = control.manual_cast_dtype

    @property
    def diffusion_model(self) -> Any:
        return self._net()

    @property
    def current_patcher(self) -> Any:
        return self._patcher()


class ControlNets:
    """The ControlNets alive in the host."""

    def __init__(
        self,
        remote: RemoteControl,
        *,
        holding: Holding,
        memory: SharedMemory,
        models: ModelRegistry,
        pristine: Pristine,
        totals: Totals,
        auto: Auto,
        before: ControlNets | None,
    ) -> None:
        """Prepare; ``before`` knows those that were loaded under other settings."""
        self._remote = remote
        self._auto = auto
        self._holding = holding
        self._memory = memory
        self._models = models
        self._pristine = pristine
        self._totals = totals
        self._known: weakref.WeakKeyDictionary[Any, ControlModel] = (
            before._known if before is not None else weakref.WeakKeyDictionary()
        )

    def loaded(self, control: Any, path: str, options: dict[str, Any], *, file: str) -> None:
        """Note which file a ControlNet came from, if it is one for the workers."""
        net = getattr(control, "control_model", None)
        if net is not None and type(net) is self._pristine.control_class:
            model = self._known[net] = ControlModel(control)
            self._models.remember(model, LOADER, path, options, file=file)

    def holds(self, net: Any) -> bool:
        """Whether this is the module of a known ControlNet."""
        return isinstance(net, torch.nn.Module) and net in self._known

    def forward(
        self,
        net: Any,
        arguments: Mapping[str, Any],
        compute: Callable[[], Residuals],
        run: Run,
    ) -> Residuals | None:
        """Compute one call on the workers.

        Args:
            arguments: the arguments of ``ControlNetFlux.forward`` by name.
            compute: ComfyUI's own forward with them.

        Returns:
            What it returns, or None: the caller runs it here. The step stays parallel either way.

        Raises:
            InterruptProcessingException: the user cancelled.
        """
        outcome = self._forward(net, arguments, compute, run)
        self._memory.ran(net, is_parallel=not isinstance(outcome, Refusal))
        if not isinstance(outcome, Refusal):
            return outcome
        out = theirs(compute)() if outcome.has_raised else None
        self._totals.controls_alone[outcome.reason] += 1
        note_once(f"a ControlNet runs on one GPU: {outcome.reason}")
        return out

    def _forward(
        self,
        net: Any,
        arguments: Mapping[str, Any],
        compute: Callable[[], Residuals],
        run: Run,
    ) -> Residuals | Refusal:
        model = self._known.get(net)
        if model is None or model.current_patcher is None:
            return Refusal("it did not come from a file of its own", Scope.STEP)
        call = Call(net, model, arguments, run, names=CARRIED_ARGUMENTS)
        call.changes += (
            *self._pristine.check_step(net),
            *self._holding.changes(model, run),
            *check_grad(arguments["x"]),
        )
        if call.changes:
            return call.changes[0]
        crew = self._holding.come_up(call)
        if isinstance(crew, Refusal):
            return crew
        plan = self._plan(crew, call)
        if isinstance(plan, Refusal):
            return plan
        if plan.pipefusion > 1:
            return Refusal("PipeFusion takes its residuals whole", Scope.STEP)
        likeness = crew.of(Likeness)
        try:
            others = likeness.changes(crew, call)
            if others:
                return others[0]
            known = self._holding.hold(crew, call, plan, is_guest=True)
            if isinstance(known, Refusal):
                return known
            room = self._holding.room_for(crew, call, known, plan)
            residuals = self._remote.forward(crew, known.number, call, plan, compute, room=room)
            return likeness.late_change(crew) or residuals
        except CardsFullError:
            return Refusal("the cards have no room for its call beside the weights", Scope.STEP)
        except UncarriedValueError as error:
            return Refusal(f"its argument cannot be carried over: {error}", Scope.STEP)
        except CallRaisedError as error:
            self._totals.failed(str(error))
            self._holding.forget_what_is_held(crew)
            return Refusal(
                f"its call raised {error.kind} on the workers", Scope.STEP, has_raised=True
            )
        except WorkerError as error:
            run.refusal = lost(error, self._totals)
            return run.refusal

    def _plan(self, crew: Crew, call: Call) -> ParallelPlan | Refusal:
        """Share a call as the model's are shared: ranks use the residuals of their own tokens."""
        run = call.run
        planned = partial(
            plan_call,
            call.workload,
            world_size=self._holding.world_size,
            no_ring=no_ring(is_prescribed=run.is_prescribed(call.module)),
            weights=crew.of(self._holding.balance).weights(run),
        )
        taken = self._auto.taken(flux_of(run.model), call) if self._auto.is_on else None
        if taken == ONE:
            return ONE_IS_FASTER
        plan = planned(strategy=parse_strategy(taken)) if taken else None
        # Where this call cannot have that plan, the model's cannot either.
        return plan if isinstance(plan, ParallelPlan) else planned(strategy=self._holding.strategy)


class RemoteControl:
    """The workers, as a function from a ControlNet's arguments to its residuals."""

    _numbers = itertools.count(1)
    """Of this process: ranks, and what they keep for a node, outlive a change of settings."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def forward(
        self,
        crew: Crew,
        model: int,
        call: Call,
        plan: ParallelPlan,
        compute: Callable[[], Residuals],
        *,
        room: Room | None = None,
    ) -> Residuals:
        """Compute one call on all ranks.

        Args:
            model: number of a ControlNet that every rank holds.
            compute: ComfyUI's own forward.
            room: for a look whether a card has it; None to compute at once.

        Returns:
            What ComfyUI's own forward returns, in residuals that are the workers'.

        Raises:
            UncarriedValueError: an argument is not of a type that can cross.
            CardsFullError: there is no room on a card.
            WorkerError: the workers are lost.
        """
        arguments = call.arguments
        slots = crew.slots
        number = next(self._numbers)
        paths = {n: f"controlnet{model}.{n}" for n in CARRIED_ARGUMENTS if n in arguments}
        with crew.turn(call.poll) as turn:
            written = slots.bytes_written
            placed = turn.place({path: arguments[name] for name, path in paths.items()})
            replies = turn.compute(
                Control(
                    request=turn.number,
                    model=model,
                    call=number,
                    grid=list(plan.grid),
                    weights=list(plan.weights),
                    arguments={name: placed[path] for name, path in paths.items()},
                ),
                room=room,
            )
            for reply in replies:
                assert isinstance(reply, Controlled)
                check_shape(reply, (arguments["x"].shape[0], *reply.shape[1:3]))
        self._totals.bytes_to_workers += slots.bytes_written - written
        self._totals.controls_parallel += 1
        for rank, reply in enumerate(replies):
            assert isinstance(reply, Controlled)
            self._totals.controlled(rank, reply.seconds)
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
        first = replies[0]
        assert isinstance(first, Controlled)
        kept = ControlCall(
            number, plan=plan, layout=first.layout, compute=compute, gone=crew.gone.calls
        )
        crew.of(calls_kept).add(kept)
        residuals = {
            index: DeferredResidual.make(
                ("residual", kept, index),
                shape=first.shape,
                dtype=getattr(torch, first.dtype),
                device=arguments["x"].device,
            )
            for index in {i for part in first.layout.values() for i in part if i is not None}
        }
        return {
            name: tuple(None if i is None else residuals[i] for i in part)
            for name, part in first.layout.items()
        }

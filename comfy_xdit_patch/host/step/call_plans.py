"""Decide how one call of a FLUX model is shared, or why it is not.

Runs in: host process. Knows settings, balance, PipeFusion's rules and what ``auto`` measured; asks
nothing of the workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pace.auto import Auto, Chosen, Kind
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.reading.limits import no_ring, no_tensor_call
from comfy_xdit_patch.host.step.pipefusion import Pipelines
from comfy_xdit_patch.host.weights.holding import Holding
from comfy_xdit_patch.planning.balance import Replan
from comfy_xdit_patch.planning.candidates import candidates
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.planner import plan_call
from comfy_xdit_patch.planning.strategy import Strategy

Planned = Callable[..., ParallelPlan | Refusal]
"""``plan_call`` for one call; takes another strategy or other weights."""


@dataclass(frozen=True, slots=True)
class CallPlan:
    """How a call is shared. ``kind`` is set if its time tells ``auto`` something."""

    plan: ParallelPlan
    replan: Replan
    """The plan that other weights of the ranks would give."""
    kind: Kind | None


class CallPlans:
    """From a call to its plan."""

    def __init__(self, holding: Holding, *, auto: Auto, pipelines: Pipelines) -> None:
        self._holding = holding
        self._auto = auto
        self._pipelines = pipelines

    def of_call(self, crew: Crew, call: Call) -> CallPlan | Refusal:
        """Share a call, as the user wants and the ranks can."""
        balance = crew.of(self._holding.balance)
        weights = balance.weights(call.run)
        planned: Planned = partial(
            plan_call,
            call.workload,
            world_size=self._holding.world_size,
            strategy=self._holding.strategy,
            needs_references=call.carried.keeps_references,
            no_ring=no_ring(
                is_overridden=call.carried.overrides_attention,
                is_prescribed=call.run.is_prescribed(call.module),
            ),
        )
        plan = planned(weights=weights)
        if isinstance(plan, Refusal):
            return plan
        kind = None
        if self._auto.is_on:
            chosen = self._tried(crew, call, plan, partial(planned, weights=weights))
            if isinstance(chosen, Refusal):
                return chosen
            plan, kind = chosen.plan, chosen.kind
            planned = partial(planned, strategy=chosen.strategy)
        refusal = _no_cuts(call) if plan.tensor > 1 else None
        if refusal is not None:
            return refusal
        plan = self._holding.fitting(crew, call, plan)
        # What ranks keep from step to step is shared so; and ControlNets must follow what is
        # left of weights that do not suit this call.
        keeps = call.carried.keeps_references or plan.pipefusion > 1
        if keeps or plan.weights != weights:
            balance.hold(call.run, plan.weights)
        refusal = self._pipelines.refusal(call, plan) if plan.pipefusion > 1 else None
        if refusal is not None:
            return refusal
        if call.changes and (plan.sequence == 1 or call.carried.keeps_references):
            return call.changes[0]
        return CallPlan(plan, _with(planned), kind)

    def _tried(
        self, crew: Crew, call: Call, usual: ParallelPlan, planned: Planned
    ) -> Chosen | Refusal:
        """Return the plan that ``auto`` gives this call, to try it or by what it measured."""

        def is_resident(plan: ParallelPlan) -> bool:
            return self._holding.is_resident(crew, call, plan)

        def can_have(strategy: Strategy) -> ParallelPlan | None:
            other = planned(strategy=strategy)
            if isinstance(other, Refusal) or (strategy.degrees.tensor > 1 and _no_cuts(call)):
                return None
            return other if is_resident(other) else None

        has_more = call.has_node_code or call.arguments.get("control") is not None
        return self._auto.turn(
            call,
            candidates(usual, call.workload, is_whole=is_resident(usual), can_have=can_have),
            is_plain=not has_more and not self._holding.is_held_back(call.model),
            is_at_rest=crew.of(self._holding.balance).is_at_rest,
            can_time_one=lambda: self._holding.can_time_alone(call.model),
        )


def _no_cuts(call: Call) -> Refusal | None:
    return no_tensor_call(call.arguments, call.carried, call.changes)


def _with(planned: Planned) -> Replan:
    return lambda weights: planned(weights=weights)

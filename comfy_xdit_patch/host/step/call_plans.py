"""Decide how one call of a FLUX model is shared, or why it is not.

Runs in: host process. Knows settings, balance, PipeFusion's rules and what ``auto`` measured; asks
nothing of the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.pace.auto import Auto, Kind
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.reading.limits import no_ring, no_tensor_call
from comfy_xdit_patch.host.reading.node_patches import CarriedPatches
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.pipefusion import Pipelines
from comfy_xdit_patch.host.weights.holding import Holding
from comfy_xdit_patch.planning.balance import Replan
from comfy_xdit_patch.planning.candidates import candidates
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.planner import plan_call
from comfy_xdit_patch.planning.strategy import Strategy
from comfy_xdit_patch.planning.workload import workload_of


@dataclass(frozen=True, slots=True)
class CallPlan:
    """How a call is shared. ``kind`` is set if its time tells ``auto`` something."""

    plan: ParallelPlan
    workload: Workload
    replan: Replan
    """The plan that other weights of the ranks would give."""
    kind: Kind | None


class CallPlans:
    """From a call to its plan."""

    def __init__(self, holding: Holding, *, auto: Auto, pipelines: Pipelines) -> None:
        self._holding = holding
        self._auto = auto
        self._pipelines = pipelines

    def of_call(
        self,
        crew: Crew,
        flux: Any,
        arguments: Mapping[str, Any],
        base_model: Any,
        run: Run,
        *,
        changes: Sequence[Refusal],
        carried: CarriedPatches,
        poll: Poll,
    ) -> CallPlan | Refusal:
        """Share a call, as the user wants and the ranks can.

        Args:
            arguments: of ``Flux._forward``, by name.
            changes: what nodes put around the blocks.
            carried: patches that go to the workers.
        """
        as_called = workload = workload_of(flux, arguments)
        if changes or carried.tree is not None:
            # A node's code may look at all rows.
            workload = replace(workload, is_batch_divisible=False)
        dtype = arguments["x"].dtype
        balance = crew.of(self._holding.balance)
        planned = partial(
            plan_call,
            workload,
            world_size=self._holding.world_size,
            strategy=self._holding.strategy,
            needs_references=carried.keeps_references,
            no_ring=no_ring(
                is_overridden=carried.overrides_attention,
                is_prescribed=run.is_prescribed(flux),
            ),
        )
        weights = balance.weights(run)
        plan = planned(weights=weights)
        if isinstance(plan, Refusal):
            return plan
        kind = None
        if self._auto.is_on:
            can_cut = no_tensor_call(arguments, carried, changes) is None

            def is_resident(plan: ParallelPlan) -> bool:
                return self._holding.is_resident(crew, plan, base_model, run, workload, dtype)

            def can_have(strategy: Strategy) -> ParallelPlan | None:
                other = planned(strategy=strategy, weights=weights)
                if isinstance(other, Refusal) or (strategy.degrees.tensor > 1 and not can_cut):
                    return None
                return other if is_resident(other) else None

            plans = candidates(plan, workload, is_whole=is_resident(plan), can_have=can_have)
            is_plain = not changes and carried.tree is None and arguments.get("control") is None
            turn = self._auto.turn(
                flux,
                as_called,
                run,
                plans,
                is_plain=is_plain and not self._holding.is_held_back(base_model),
                is_at_rest=balance.is_at_rest,
                can_time_one=lambda: self._holding.can_time_alone(base_model),
            )
            if isinstance(turn, Refusal):
                return turn
            plan, kind = plans[turn.strategy], turn.kind
            planned = partial(planned, strategy=turn.strategy)
        if plan.tensor > 1:
            refusal = no_tensor_call(arguments, carried, changes)
            if refusal is not None:
                return refusal
        plan = self._holding.fitting(crew, plan, base_model, workload, dtype)
        # What ranks keep from step to step is shared so; and ControlNets must follow what is
        # left of weights that do not suit this call.
        keeps = carried.keeps_references or plan.pipefusion > 1
        if keeps or plan.weights != weights:
            balance.hold(run, plan.weights)
        if plan.pipefusion > 1:
            options = arguments.get("transformer_options") or {}
            refusal = self._pipelines.refusal(
                flux, options, run=run, plan=plan, changes=changes, carried=carried
            )
            if refusal is not None:
                return refusal
        if changes and (plan.sequence == 1 or carried.keeps_references):
            return changes[0]
        return CallPlan(plan, workload, _with(planned), kind)


def _with(planned: Callable[..., ParallelPlan | Refusal]) -> Replan:
    return lambda weights: planned(weights=weights)

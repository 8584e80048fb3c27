"""Have the workers ready and holding a model, before one of its calls.

Runs in: host process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from comfy_xdit_patch.errors import Refusal, Scope, WorkerError
from comfy_xdit_patch.host import page
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pace.rank_speeds import CrewBalance
from comfy_xdit_patch.host.pool.crew import Crew, Room
from comfy_xdit_patch.host.pool.pool import Pool, PoolState
from comfy_xdit_patch.host.reading.eligibility import Pristine
from comfy_xdit_patch.host.reading.limits import no_tensor_weights
from comfy_xdit_patch.host.reading.models import KnownModel, ModelRegistry, flux_of
from comfy_xdit_patch.host.reading.weight_states import WeightState
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.weights.held import RemoteWeights
from comfy_xdit_patch.host.weights.one_owner import SharedMemory
from comfy_xdit_patch.host.weights.residency import Placement, Residency
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.strategy import Strategy
from comfy_xdit_patch.report.status import Totals

LOST = Refusal("a worker was lost")
STARTING = Refusal("the workers are still starting", Scope.STEP)
NOT_STARTED = Refusal("the workers did not start")


class Holding:
    """Workers that hold what a call needs."""

    def __init__(
        self,
        *,
        pool: Pool,
        weights: Callable[[Crew], RemoteWeights],
        residency: Callable[[Crew], Residency],
        memory: SharedMemory,
        totals: Totals,
        pristine: Pristine,
        models: ModelRegistry,
        strategy: Strategy,
        balance: Callable[[Crew], CrewBalance],
        waits: bool,
    ) -> None:
        """Prepare; ``weights``, ``residency`` and ``balance`` are asked of a crew."""
        self._pool = pool
        self._weights = weights
        self._residency = residency
        self._memory = memory
        self._totals = totals
        self._pristine = pristine
        self._models = models
        self.world_size = pool.world_size
        self.strategy = strategy
        self.balance = balance
        self._waits = waits
        """For workers that start, although ComfyUI could compute alone meanwhile."""
        self._is_start_shown = False
        """In the page, where it stays until something else is said."""

    @property
    def crew(self) -> Crew | None:
        """The ranks that live now."""
        return self._pool.crew

    def come_up(self, call: Call) -> Crew | Refusal:
        """Have the workers ready; while they start, ComfyUI computes alone if that is quicker.

        It is not where ComfyUI's own copy of the model stays off the GPU that a worker is to have.
        """
        pool = self._pool
        crew = pool.crew
        if crew is not None and not self._is_start_shown:
            return crew
        pool.start()
        if pool.state is PoolState.STARTING:
            text = f"starting {pool.world_size} {pool.device_word}"
            self._is_start_shown = True
            if not (self._waits or self.is_held_back(call.model)):
                page.tell(f"{text}, ComfyUI computes alone meanwhile")
                return STARTING
            page.tell(f"{text}...")
        try:
            crew = pool.wait_until_ready(call.poll)
        except WorkerError as error:
            self._totals.failed(str(error))
            self._show_end_of_start(NOT_STARTED.reason)
            return replace(NOT_STARTED, error=str(error))
        self._show_end_of_start(f"{pool.world_size} {pool.device_word} are ready")
        return crew

    def _show_end_of_start(self, text: str) -> None:
        if self._is_start_shown:
            self._is_start_shown = False
            page.tell(text)

    def hold(
        self, crew: Crew, call: Call, plan: ParallelPlan, *, is_guest: bool = False
    ) -> KnownModel | Refusal:
        """Have every rank hold a call's model as its current ModelPatcher has it.

        Args:
            is_guest: the model may not drive another one off the workers' cards.

        Returns:
            The model as the workers know it now. A refusal is around the blocks if it is known only
            since they hold the model: then ``changes`` has it too.

        Raises:
            WorkerError: the workers are lost.
        """
        model, run = call.model, call.run
        run.in_use.add(model)
        known = self._models.follow_file(
            model, run.models.get(id(model)) or self._models.find(model)
        )
        if isinstance(known, Refusal):
            return known
        if plan.tensor > 1:
            refusal = no_tensor_weights(model, plan.tensor, run.tensor)
            if refusal is not None:
                return refusal
        weights = crew.of(self._weights)
        state = weights.state(crew, model, self._bypass(model, run))
        if isinstance(state, Refusal):
            return state
        place = self._place(crew, call, plan, state, is_guest=is_guest)
        if isinstance(place, Refusal):
            return place
        if is_guest:
            others = {self._models.find(other).number for other in run.in_use}
            can_be_guest = place.residence.is_whole or plan.tensor > 1
            if not (can_be_guest and weights.lets_in(known, place, others)):
                return Refusal("it does not fit on the cards beside the model", Scope.STEP)
        return self._held(crew, call, known, state, place)

    def _place(
        self, crew: Crew, call: Call, plan: ParallelPlan, state: WeightState, *, is_guest: bool
    ) -> Placement | Refusal:
        """Decide where the weights of a call's model lie."""
        residency = crew.of(self._residency)
        place = residency.place(
            call.model,
            call.workload,
            plan,
            call.dtype,
            first="full" if is_guest else self.strategy.first_mode,
            # A guest needs the room, hooks whole weights as they are stored.
            may_cast=not (is_guest or state.is_hooked or state.tree["bypass"]),
        )
        if isinstance(place, Refusal):
            return place
        residence = place.residence
        if state.is_hooked and not residence.is_whole:
            # Each change of hooks would load the shards, or what lies in CPU memory, again.
            return Refusal("hook-scheduled weight patches need the whole model on every card")
        if residence.grid and state.tree["bypass"] is not None:
            return Refusal("bypass LoRAs need the whole model on every card")
        if state.tree["bypass"] and plan.tensor > 1:
            return Refusal("XDIT_STRATEGY cuts the weights (tensor), and a LoRA bypasses them")
        if not is_guest:
            self._totals.residency = residency.arithmetic
            self._totals.planned_bytes = place.needed_bytes
        return place

    def _held(
        self, crew: Crew, call: Call, known: KnownModel, state: WeightState, place: Placement
    ) -> KnownModel | Refusal:
        """Load weights, or compare those that ranks hold, if this run has not done so yet."""
        model, run, weights = call.model, call.run, crew.of(self._weights)
        is_gathered = bool(call.changes)
        # Also once in every run: the host's weights are compared with the workers' again.
        is_held = weights.holds(known, place.residence, state.key)
        part = "blocks" if is_gathered else "whole"
        of_run = weights.compared.setdefault(run, set())
        is_compared = (*weights.comparison(known, state), part) in of_run
        is_compared = is_compared and weights.holds(known, place.residence)
        if not (is_compared and is_held):
            if not is_compared:
                held = known.number if is_held else None
                self._memory.make_room_for_workers(
                    weights, model, place.needed_bytes, run.in_use, held=held
                )
            loaded = weights.load(
                crew,
                model,
                known,
                state,
                place,
                is_compared=is_compared,
                is_gathered=is_gathered,
                poll=call.poll,
            )
            if isinstance(loaded, Refusal):
                run.changes.pop(id(model), None)
                return loaded
            known = run.models[id(model)] = loaded
            of_run.add((*weights.comparison(known, state), part))
        weights.working_bytes[known.number] = place.working_bytes
        return known

    def is_held_back(self, model: Any) -> bool:
        """Whether ComfyUI keeps its own copy in CPU memory because a worker has one on its GPU."""
        patcher = getattr(model, "current_patcher", None)
        return patcher is not None and self._memory.is_held_back(patcher)

    def room_for(self, crew: Crew, call: Call, known: KnownModel, plan: ParallelPlan) -> Room:
        """Say what a call takes on a card beside the weights, and how ComfyUI leaves it that."""
        weights = crew.of(self._weights)
        kind = known.number, plan, call.workload
        is_known = kind in weights.had_room
        num_bytes = 0 if is_known else weights.working_bytes.get(known.number, 0)
        weights.had_room.add(kind)

        def make(shortage: str) -> None:
            self._totals.failed(shortage)
            weights.had_room.clear()
            self._memory.empty_cache()
            self._memory.make_room_for_workers(weights, call.model, num_bytes, call.run.in_use)

        return Room(num_bytes, make)

    def can_time_alone(self, model: Any) -> bool:
        """Whether ComfyUI's own forward would now take what it takes without workers."""
        return self._memory.fits_beside_worker(model.current_patcher)

    def is_resident(self, crew: Crew, call: Call, plan: ParallelPlan) -> bool:
        """Whether every rank can have on its card all weights that it computes with.

        Args:
            plan: one that ``auto`` may take.
        """
        model, run = call.model, call.run
        if plan.tensor > 1 and (
            no_tensor_weights(model, plan.tensor, run.tensor) or self._bypass(model, run)
        ):
            return False
        plan = self.fitting(crew, call, plan)
        return crew.of(self._residency).is_resident(model, call.workload, plan, call.dtype)

    def _bypass(self, model: Any, run: Run) -> dict[str, list[Any]]:
        """ComfyUI's bypass hooks on a model's modules. Looked for once a run."""
        if id(model) not in run.bypass:
            run.bypass[id(model)] = self._pristine.bypass.hooks_of(flux_of(model))
        return run.bypass[id(model)]

    def fitting(self, crew: Crew, call: Call, plan: ParallelPlan) -> ParallelPlan:
        """Return a plan, with even shares if larger ones do not fit on their cards."""
        residency = crew.of(self._residency)
        if not plan.weights or residency.has_room_for_shares(
            call.model, call.workload, plan, call.dtype
        ):
            return plan
        return replace(plan, weights=())

    def has_changed_file(self, run: Run) -> bool:
        """Whether the ranks may have read other weights than ComfyUI's in this step."""
        return any(self._models.has_changed(known) for known in run.models.values())

    def forget_what_is_held(self, crew: Crew) -> None:
        """Have the next run see to it that every rank holds what it should: a call failed there."""
        crew.of(self._weights).held.clear()

    def state_key(self, crew: Crew, known: KnownModel) -> str:
        """Name the state of the weights that every rank holds of a model."""
        return crew.of(self._weights).state_key(known)

    def changes(self, model: Any, run: Run) -> list[Refusal]:
        """What others hung on single modules of a model, or set there. Looked for once a run."""
        if id(model) not in run.changes:
            known = run.models.get(id(model)) or self._models.find(model)
            found = run.changes[id(model)] = list(self._pristine.check_modules(flux_of(model)))
            crew = self.crew
            if crew is not None:
                comparisons = crew.of(self._weights).comparisons
                found += comparisons.changed_attributes(model, known.number)
        return run.changes[id(model)]

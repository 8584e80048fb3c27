"""Choose the plan of one call.

Runs in: host (and the doctor). Pure: numbers in, a plan or a refusal out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import gcd

from comfy_xdit_patch.errors import PlanError, Refusal, Scope, SettingsError
from comfy_xdit_patch.planning.grid import Degrees
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.sequence_shares import KEPT_ANSWERS
from comfy_xdit_patch.planning.strategy import AUTO, AXES_OF, FREE, NAMES, PLAN, WEIGHTS, Strategy

BATCH_EFFICIENCY = 0.9
"""Rows are whole numbers. Where dealing them to unequal ranks reaches less than this of what the
ranks can do, ``auto`` shares the sequence instead; its communication costs about the rest."""


@lru_cache(maxsize=KEPT_ANSWERS)
def plan_call(
    workload: Workload,
    *,
    world_size: int,
    strategy: Strategy = AUTO,
    needs_references: bool = False,
    no_ring: Refusal | None = None,
    weights: tuple[int, ...] = (),
) -> ParallelPlan | Refusal:
    """Share a call among all ranks, as the user named it or as ``auto`` does.

    Every rank takes part in every step: a plan that leaves a rank without work is refused, and so
    is a call that a named strategy cannot share. Nothing else than what was named is put in its
    place.

    Args:
        strategy: one that ``check_strategy`` let pass.
        needs_references: if there are reference tokens, every rank must hold one.
        no_ring: why this call's attention cannot go round a ring.
        weights: relative speed of the ranks. Where they leave a rank without a token, all are
            taken to be equal.
    """
    refusal: Refusal | None = None
    for tried in (weights, ()) if weights else ((),):
        is_free = strategy.name in FREE
        plan = _auto(workload, world_size) if is_free else named_plan(strategy, world_size)
        if is_free and tried:
            plan = _auto_of_unequal(plan, workload, tried)
        # Stages have equal parts of the blocks, and their ranks the same tokens.
        plan = replace(plan, weights=() if plan.pipefusion > 1 else tried)
        refusal = _refusal(workload, plan, needs_references, no_ring)
        if refusal is None:
            return plan
    assert refusal is not None
    return refusal


def _refusal(
    workload: Workload, plan: ParallelPlan, needs_references: bool, no_ring: Refusal | None
) -> Refusal | None:
    """Say why a call cannot be shared by this plan."""
    if plan.batch > 1 and not workload.is_batch_divisible:
        return Refusal(
            "XDIT_STRATEGY shares the batch, and something in this call belongs to all rows",
            Scope.STEP,
        )
    if workload.batch_size < plan.batch:
        return Refusal(
            f"XDIT_STRATEGY wants the batch in {plan.batch} parts, and this one has fewer rows",
            Scope.STEP,
        )
    if plan.tensor > workload.num_heads:
        return Refusal(
            f"XDIT_STRATEGY cuts the heads in {plan.tensor} parts (tensor), and the model "
            f"has {workload.num_heads}"
        )
    if plan.ring > 1 and no_ring is not None:
        return no_ring
    for first in plan.first_ranks:
        try:
            shares = plan.shares_of_call(first, workload)
        except PlanError:
            return Refusal(
                f"the image or the prompt has fewer tokens than {plan.world_size} ranks need",
                Scope.STEP,
            )
        if needs_references and workload.num_reference_tokens and min(shares.reference) < 1:
            return Refusal(
                f"a reference has fewer tokens than {plan.world_size} ranks need", Scope.STEP
            )
    return None


def _auto(workload: Workload, world_size: int) -> ParallelPlan:
    """Share the batch first, for it needs no communication, then the token sequence.

    The batch axis takes the greatest common divisor of rows and ranks, so that all rows are shared
    equally; what is left goes to the sequence axis (``ulysses``).
    """
    batch = gcd(workload.batch_size, world_size) if workload.is_batch_divisible else 1
    return ParallelPlan(batch=batch, ulysses=world_size // batch)


def _auto_of_unequal(
    plan: ParallelPlan, workload: Workload, weights: tuple[int, ...]
) -> ParallelPlan:
    """Give the batch axis fewer ranks where whole rows do not suit their speeds."""
    world_size = plan.world_size
    for degree in range(plan.batch, 1, -1):
        if plan.batch % degree == 0:
            found = ParallelPlan(batch=degree, ulysses=world_size // degree, weights=weights)
            if _batch_efficiency(found, workload.batch_size) >= BATCH_EFFICIENCY:
                return found
    return ParallelPlan(ulysses=world_size, weights=weights)


def _batch_efficiency(plan: ParallelPlan, batch_size: int) -> float:
    """The time of ranks that share everything as they should, over that of whole rows."""
    times = []
    for index, rank in enumerate(plan.first_ranks):
        first, end = plan.batch_rows(rank, batch_size)
        times.append((end - first) / sum(plan.place_weights(index)))
    return batch_size / sum(plan.weights) / max(times)


def named_plan(strategy: Strategy, world_size: int) -> ParallelPlan:
    """Return the plan that a strategy stands for; ``FREE`` ones stand for none.

    ``usp`` has the smallest ring of them all: it sends the fewest bytes.

    Raises:
        PlanError: there is none for this number of ranks.
    """
    if strategy.name == PLAN:
        degrees = strategy.degrees
        for name in WEIGHTS:
            if getattr(strategy, name) not in (0, world_size):
                raise PlanError(f"{name}={getattr(strategy, name)} is not world_size {world_size}.")
        if degrees.pipefusion > 1 and degrees.ring > 1:
            raise PlanError("A ring inside of pipefusion would pass all keys for every patch.")
        sharers = {
            "fsdp": strategy.fsdp > 0,
            "modulation": strategy.modulation > 0,
            "pipefusion": degrees.pipefusion > 1,
            "tensor": degrees.tensor > 1,
        }
        used = [name for name, is_used in sharers.items() if is_used]
        if len(used) > 1:
            raise PlanError(f"{used[0]} and {used[1]} both share out the blocks' weights.")
        if degrees.world_size != world_size:
            raise PlanError(f"{degrees.product} is not world_size {world_size}.")
        return ParallelPlan(*degrees.grid)
    *others, last = AXES_OF[strategy.name]
    if not others:
        return ParallelPlan(*Degrees(**{last: world_size}).grid)
    divisors = [n for n in range(2, world_size) if world_size % n == 0]
    if not divisors:
        raise PlanError(f"{world_size} ranks are not a product of two degrees.")
    return ParallelPlan(ulysses=world_size // divisors[0], ring=divisors[0])


def check_strategy(strategy: Strategy, *, world_size: int) -> None:
    """Refuse a strategy that no call could follow with this number of ranks.

    Raises:
        SettingsError: with those that could.
    """
    if strategy.name in FREE:
        return
    try:
        named_plan(strategy, world_size)
    except PlanError as error:
        legal = "; ".join(legal_strategies(world_size))
        raise SettingsError(
            f'XDIT_STRATEGY="{strategy}" does not fit {world_size} ranks: {error} Legal: {legal}.'
        ) from None


def legal_strategies(world_size: int) -> list[str]:
    """Every value of ``XDIT_STRATEGY`` that fits so many ranks."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    plans = [
        Degrees(batch, pipefusion, ring, ulysses, rest // ring).name
        for pipefusion, batch, ulysses in product(divisors, repeat=3)
        if world_size % (pipefusion * batch * ulysses) == 0
        for rest in (world_size // (pipefusion * batch * ulysses),)
        for ring in reversed(divisors)
        if rest % ring == 0 and (pipefusion == 1 or rest == 1)
    ]
    is_product = len(divisors) > 2
    names = [name for name in NAMES if name != "usp" or is_product]
    return [*names, *(plans if world_size > 1 else ())]

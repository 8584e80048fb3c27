"""Which plans ``auto`` tries for a call: the usual one, and one other that could be faster.

Runs in: host. Pure: numbers in, plans out.

    usual     rows shared first, then tokens by Ulysses
    ring      the same with the smallest ring in it, where the ranks hold the weights whole:
              published times have it 3 % ahead on two GPUs, 3 to 10 % behind on four of one socket;
              nobody has published it across sockets, or where the heads do not divide
    tensor    the same with blocks cut in the fewest parts that fit, where the ranks do not hold the
              weights whole: what is cut is neither gathered nor copied

All of them are exact. Trying one takes a few steps and, on four ranks or more, a group of NCCL's;
eight ranks have ten plans and more, most of which only ever lose.
"""

from __future__ import annotations

from collections.abc import Callable

from comfy_xdit_patch.planning.grid import Degrees
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.strategy import AUTO, PLAN, Strategy


def candidates(
    usual: ParallelPlan,
    workload: Workload,
    *,
    is_whole: bool,
    can_have: Callable[[Strategy], ParallelPlan | None],
) -> dict[Strategy, ParallelPlan]:
    """Return the plans to try, the usual one first.

    Args:
        usual: what ``auto`` takes where nothing was measured.
        is_whole: with it, the ranks hold the weights whole.
        can_have: the plan of a strategy, or None if this call cannot have it.
    """
    others = _with_ring(usual, workload.num_heads) if is_whole else _with_cuts(usual)
    found = {AUTO: usual}
    for strategy in others:
        plan = can_have(strategy)
        if plan is not None:
            return found | {strategy: plan}
    return found


def _with_ring(usual: ParallelPlan, num_heads: int) -> list[Strategy]:
    """Return the plan with the smallest ring whose Ulysses groups share the heads evenly."""
    degree = usual.ulysses
    if degree == 1:
        return []
    ulysses = max(n for n in range(1, degree) if degree % n == 0 and num_heads % n == 0)
    return [_plan(batch=usual.batch, ulysses=ulysses, ring=degree // ulysses)]


def _plan(**degrees: int) -> Strategy:
    return Strategy(PLAN, Degrees(**degrees))


def _with_cuts(usual: ParallelPlan) -> list[Strategy]:
    """Return plans that cut the blocks, in the fewest parts first: those exchange the least.

    Ranks that share tokens cut first, and then those that share rows.
    """
    batch, ulysses = usual.batch, usual.ulysses
    found = []
    for tensor in (n for n in range(2, usual.world_size + 1) if usual.world_size % n == 0):
        if ulysses % tensor == 0:
            found.append(_plan(batch=batch, ulysses=ulysses // tensor, tensor=tensor))
        elif tensor % ulysses == 0 and batch % (tensor // ulysses) == 0:
            found.append(_plan(batch=batch * ulysses // tensor, tensor=tensor))
    return found

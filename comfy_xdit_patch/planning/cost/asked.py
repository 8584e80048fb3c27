"""What a user may ask for: a strategy by name, or a plan by its degrees.

Runs in: the command line's process.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfy_xdit_patch.planning.cost.candidate import SINGLE, Candidate
from comfy_xdit_patch.planning.grid import AXES
from comfy_xdit_patch.planning.strategy import AXES_OF, FREE, NAMES, PLAN, parse_strategy

EXACT = frozenset({"batch", "ulysses", "ring"})
"""Axes that share rows and tokens, whose image is one GPU's, up to rounding; ``auto`` takes no
others. Cutting weights (``tensor``) is as exact, and used by name."""
BUILT = EXACT | {"tensor", "pipefusion"}
"""The axes that the engine has."""
NAMED = tuple(name for name in NAMES if name != "off")
STRATEGY_LEGAL = (
    f"single, {', '.join(NAMED)}, or a plan such as batch=2,ulysses=2: degrees of "
    f"{', '.join(AXES)}, and fsdp=N or offload=N for the weights of all N ranks"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """``text`` as the user wrote it. ``plan`` is set where the degrees are given."""

    text: str = "auto"
    plan: Candidate | None = None

    def allows(self, plan: Candidate) -> bool:
        """Whether a plan is what was asked for. One GPU is part of ``auto`` only."""
        if self.plan is not None:
            return plan == self.plan
        if self.text in FREE:
            is_as_asked = self.text != "fsdp" or plan.weights == "sharded"
            return is_as_asked and EXACT.issuperset(plan.axes)
        return set(plan.axes) == set(AXES_OF[self.text])


def is_built(plan: Candidate) -> bool:
    """Whether the engine can follow a plan: in a pipeline stage there is no ring, and no tensor."""
    return BUILT.issuperset(plan.axes) and (plan.pipefusion == 1 or plan.ring * plan.tensor == 1)


def parse_asked(text: str) -> Asked:
    """Read what ``XDIT_STRATEGY`` takes, and besides ``single`` and ``offload=N``.

    Raises:
        ValueError: it is neither; ``STRATEGY_LEGAL`` says what is.
    """
    word = text.lower().replace(" ", "")
    if word == "single":
        return Asked(word, SINGLE)
    try:
        # Both say where the weights of all ranks lie, and a plan has one of them.
        strategy = parse_strategy(word.replace("offload=", "fsdp="))
    except ValueError:
        raise ValueError(text) from None
    if strategy.name in NAMED:
        return Asked(strategy.name)
    plan = Candidate(
        *strategy.degrees.grid,
        weights="full" if not strategy.fsdp else "offload" if "offload=" in word else "sharded",
    )
    is_split_already = plan.pipefusion > 1 or plan.tensor > 1
    if strategy.name != PLAN or (
        strategy.fsdp and (strategy.fsdp != plan.world_size or is_split_already)
    ):
        raise ValueError(text)
    return Asked(plan.name, plan)

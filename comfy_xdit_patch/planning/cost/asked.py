"""What a user may ask for: a strategy by name, or a plan by its degrees.

Runs in: the command line's process.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfy_xdit_patch.planning.cost.candidate import SINGLE, Candidate
from comfy_xdit_patch.planning.grid import AXES
from comfy_xdit_patch.planning.strategy import PLAN, parse_strategy

EXACT = frozenset({"batch", "ulysses", "ring"})
"""Axes that share rows and tokens, whose image is one GPU's, up to rounding; ``auto`` takes no
others. Cutting weights (``tensor``) is as exact, and used by name."""
BUILT = EXACT | {"tensor", "pipefusion"}
"""The axes that the engine has."""
STRATEGY_AXES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # name: axes that it must have, axes that it may have besides
    "auto": (frozenset(), EXACT),
    "batch": (frozenset({"batch"}), frozenset()),
    "ulysses": (frozenset({"ulysses"}), frozenset()),
    "ring": (frozenset({"ring"}), frozenset()),
    "usp": (frozenset({"ulysses", "ring"}), frozenset()),
    "tensor": (frozenset({"tensor"}), frozenset()),
    "pipefusion": (frozenset({"pipefusion"}), frozenset()),
    "fsdp": (frozenset(), frozenset({"batch", "ulysses", "ring"})),
}
STRATEGY_LEGAL = (
    f"single, {', '.join(STRATEGY_AXES)}, or a plan such as batch=2,ulysses=2: degrees of "
    f"{', '.join(AXES)}, and fsdp=N, modulation=N or offload=N for the weights of all N ranks"
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
        needed, besides = STRATEGY_AXES[self.text]
        used = axes_of(plan)
        if self.text == "fsdp" and plan.weights != "sharded":
            return False
        return needed <= used <= needed | besides


def is_built(plan: Candidate) -> bool:
    """Whether the engine can follow a plan: in a pipeline stage there is no ring, and no tensor."""
    axes = axes_of(plan)
    return axes <= BUILT and not ("pipefusion" in axes and axes & {"ring", "tensor"})


def axes_of(plan: Candidate) -> frozenset[str]:
    """The axes on which a plan has several ranks."""
    return frozenset(axis for axis, degree in plan.degrees.items() if degree > 1)


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
    if strategy.name in STRATEGY_AXES:
        return Asked(strategy.name)
    plan = Candidate(
        **{axis: getattr(strategy, axis) for axis in AXES},
        weights="offload" if "offload=" in word else strategy.first_mode,
    )
    is_split_already = plan.pipefusion > 1 or plan.tensor > 1
    sharers = [degree for degree in (strategy.fsdp, strategy.modulation) if degree]
    if strategy.name != PLAN or (sharers and (sharers != [plan.world_size] or is_split_already)):
        raise ValueError(text)
    return Asked(plan.name, plan)

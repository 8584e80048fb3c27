"""What a user may ask for: a strategy by name, or a plan by its degrees.

Runs in: host and the command line's process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from comfy_xdit_patch.planning.candidate import AXES, SINGLE, Candidate
from comfy_xdit_patch.planning.residency import Mode

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
ALIASES = {"cfg": "batch"}
WEIGHT_WORDS: dict[str, Mode] = {"fsdp": "sharded", "offload": "offload"}

STRATEGY_LEGAL = (
    f"single, {', '.join(STRATEGY_AXES)}, or a plan such as batch=2,ulysses=2: degrees of "
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
    """Read a strategy or a plan; ``cfg`` is another word for ``batch``.

    Raises:
        ValueError: it is neither; ``STRATEGY_LEGAL`` says what is.
    """
    word = text.lower().replace(" ", "")
    word = ALIASES.get(word, word)
    if word == "single":
        return Asked(word, SINGLE)
    if word in STRATEGY_AXES:
        return Asked(word)
    plan = _parse_degrees(word)
    if plan is None:
        raise ValueError(text)
    return Asked(plan.name, plan)


def _parse_degrees(text: str) -> Candidate | None:
    degrees: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([a-z]+)=([1-9]\d?)", part)
        name = ALIASES.get(match[1], match[1]) if match else ""
        if match is None or name in degrees or name not in {*AXES, *WEIGHT_WORDS}:
            return None
        degrees[name] = int(match[2])
    words = [word for word in WEIGHT_WORDS if word in degrees]
    sizes = [degrees.pop(word) for word in words]
    if not words:
        return Candidate(weights="full", **degrees)
    # ``fsdp=4`` alone is four ranks that share the sequence.
    plan = Candidate(**(degrees or {"ulysses": sizes[0]}), weights=WEIGHT_WORDS[words[0]])
    is_sound = (
        len(words) == 1 and sizes[0] == plan.world_size and plan.pipefusion == plan.tensor == 1
    )
    return plan if is_sound else None

"""Wrap attributes of ComfyUI: all or none, and switched off again.

Runs in: host process. The only module that imports wrapt.

Three facts about Python shape this file.
    Another extension may wrap the same attribute after us, so a wrapper is never peeled off. Ours
        stays in place and, when inactive, calls straight through.
    ComfyUI changes between versions, so each point names what it expects, and one point that does
        not fit keeps all of them out.
    Dynamo looks through wrapt's wrapper (by ``__wrapped__``) and would compile the original, so
        that a compiled FLUX ran on one GPU unseen. A mark on the original stops it there.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import wrapt

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""wrapt's signature: (wrapped, instance, args, kwargs)."""

DYNAMO_MARK = "_torchdynamo_disable"
"""What ``torch.compiler.disable`` sets on a function. Set by hand, since calling it costs the
import of all of Dynamo (1.2 s) and puts one more wrapper around every call."""


@dataclass(frozen=True, slots=True)
class PatchPoint:
    """One attribute of ComfyUI that we wrap, and why."""

    module: str
    attribute: str
    wrapper: Wrapper
    parameters: frozenset[str]
    reason: str
    hidden_from_dynamo: bool = False
    only_notes: bool = False
    """Changes nothing that ComfyUI does, and goes on noting while the others are switched off."""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}"

    def original(self) -> Any:
        """What stands there now; asked before we wrap it."""
        module = importlib.import_module(self.module)
        return wrapt.resolve_path(module, self.attribute)[2]

    def misfit(self) -> str | None:
        """Why this point does not fit this ComfyUI, or None."""
        try:
            _, _, original = wrapt.resolve_path(
                importlib.import_module(self.module), self.attribute
            )
        except (ImportError, AttributeError) as error:
            return f"{self.name} is missing ({error})"
        missing = self.parameters - set(inspect.signature(original).parameters)
        return f"{self.name} has no parameter {', '.join(sorted(missing))}" if missing else None


class PatchSet:
    """A table of patch points with two states, active and not."""

    def __init__(self, points: Sequence[PatchPoint]) -> None:
        self.points = tuple(points)
        self.active = False
        self._is_wrapped = False
        self._hidden: list[Any] = []

    def install(self) -> str | None:
        """Wrap every point, or none.

        Returns:
            Why the points do not fit this ComfyUI; None when all are in place.
        """
        if not self._is_wrapped:
            for point in self.points:
                misfit = point.misfit()
                if misfit is not None:
                    return misfit
            for point in self.points:
                if point.hidden_from_dynamo:
                    self._hidden.append(point.original())
                wrapt.wrap_object(
                    importlib.import_module(point.module),
                    point.attribute,
                    wrapt.FunctionWrapper,
                    (point.wrapper, None if point.only_notes else self._is_active),
                )
            self._is_wrapped = True
        for original in self._hidden:
            setattr(original, DYNAMO_MARK, True)
        self.active = True
        return None

    def uninstall(self) -> None:
        """Have every wrapper call straight through from now on that does more than note."""
        self.active = False
        for original in self._hidden:
            if hasattr(original, DYNAMO_MARK):
                delattr(original, DYNAMO_MARK)

    def _is_active(self) -> bool:
        return self.active

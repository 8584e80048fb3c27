"""How a call comes to a model's ``_forward``, and who put something in its way.

Runs in: host. Reads ComfyUI's objects, changes nothing.

Our wrapper lies around ``_forward``. A class or an object with a ``forward`` of its own need not
come there, and nothing would be said: its calls are met one step earlier, at ``forward``.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

from comfy_xdit_patch.blame import origin
from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.family import CONTROL, MEMBERS

WAYS = ("forward", "_forward")


class WaysIn:
    """ComfyUI's own classes of the family, and their ways in, before any node pack ran."""

    def __init__(self, modules: Mapping[str, types.ModuleType]) -> None:
        """Remember them.

        Args:
            modules: ``sys.modules`` or a part of it.
        """
        self._stock: dict[type[Any], dict[str, Any]] = {}
        for member in MEMBERS:
            if member.module in modules:
                cls = getattr(modules[member.module], member.name)
                self._stock[cls] = {name: _of_class(cls, name) for name in WAYS}

    def class_of(self, flux: Any) -> type[Any] | None:
        """ComfyUI's class that a model is of, or that its class was made from."""
        for cls in type(flux).__mro__:
            if (cls.__module__, cls.__name__) == (CONTROL.module, CONTROL.name):
                return None
            if cls in self._stock:
                return cls
        return None

    def signature(self, flux: Any) -> inspect.Signature:
        """What ComfyUI calls a model of this class with."""
        cls = self.class_of(flux)
        assert cls is not None, "a model of the family"
        return inspect.signature(self._stock[cls]["forward"])

    def obstacle(self, flux: Any) -> Refusal | None:
        """What may keep a call of this model from coming to ``_forward``."""
        cls = self.class_of(flux)
        if cls is None:
            return None
        for name in WAYS:
            found, own = _of_class(type(flux), name), vars(flux).get(name)
            # What was put back leaves the bound original behind: compare functions.
            if own is not None and getattr(own, "__func__", own) is not found:
                return Refusal(
                    f"a node put a {name} of its own on the whole model: {origin(own)}",
                    is_around_blocks=True,
                )
            stock = self._stock[cls][name]
            # Ours lies around the stock one.
            if found is not stock and getattr(found, "__wrapped__", None) is not stock:
                return Refusal(
                    f"the model's class has a {name} of its own: {origin(found)}",
                    is_around_blocks=True,
                )
        return None


def _of_class(cls: type[Any], name: str) -> Any:
    return inspect.getattr_static(cls, name, None)

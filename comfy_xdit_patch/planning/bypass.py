"""ComfyUI's bypass LoRAs: adapters that a layer's forward computes beside its weight.

Runs in: host. Reads ComfyUI's objects, changes nothing.

ComfyUI's ``BypassForwardHook`` puts itself in the place of a layer's ``forward`` and calls what it
found there (comfy/weight_adapter/bypass.py, from 0.33). It works on one token at a time, so the
workers are given its adapter and make the same hook on their own layer.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

MODULE = "comfy.weight_adapter.bypass"


class BypassCode:
    """ComfyUI's own bypass code as it was when ComfyUI imported it."""

    def __init__(self, modules: Mapping[str, types.ModuleType]) -> None:
        """Remember it.

        Args:
            modules: ``sys.modules`` or a part of it.
        """
        module = modules.get(MODULE)
        self._forward: Any = None
        self._injections: frozenset[Any] = frozenset()
        if module is not None:
            self._forward = module.BypassForwardHook._bypass_forward
            code = module.BypassInjectionManager.create_injections.__code__
            self._injections = frozenset(
                constant for constant in code.co_consts if isinstance(constant, types.CodeType)
            )

    def makes(self, injection: Any) -> bool:
        """Whether a ``PatcherInjection`` is one of ComfyUI's bypass LoRAs."""
        return getattr(injection.inject, "__code__", None) in self._injections

    def hooks_on(self, module: Any) -> list[Any] | None:
        """Return the bypass hooks around a module's forward, the innermost first.

        Returns:
            None if something else lies around it, or between them.
        """
        found: list[Any] = []
        forward = module.__dict__.get("forward")
        while self._forward is not None and getattr(forward, "__func__", None) is self._forward:
            hook = forward.__self__
            if hook in found or hook.module is not module:
                return None
            found.insert(0, hook)
            forward = hook.original_forward
        # What was put back leaves the bound original behind: compare functions.
        stock = inspect.getattr_static(type(module), "forward", None)
        is_stock = forward is None or getattr(forward, "__func__", forward) is stock
        return found if is_stock else None

    def hooks_of(self, flux: Any) -> dict[str, list[Any]]:
        """Return the bypass hooks of all modules that have some, by the module's name."""
        found = {}
        for compiled_name, module in flux.named_modules():
            name = ".".join(part for part in compiled_name.split(".") if part != "_orig_mod")
            hooks = self.hooks_on(module)
            if hooks:
                found[name] = hooks
        return found

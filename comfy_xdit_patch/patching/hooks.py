"""Hooks that ComfyUI's own copy of a model does without, while the workers run it.

Runs in: host process.

For each change of hooks ComfyUI writes a model's weights anew (comfy/model_patcher.py,
``patch_hooks``), twice in a step where two prompts have different ones. Nobody reads them while the
workers compute; and where a worker has this GPU they lie in CPU memory, where that takes seconds.
So it is left out, and made up for before ComfyUI's own forward runs: ``patch_hooks`` goes by what
it has put aside and not by ``current_hooks``, so it may be left out any number of times.
"""

from __future__ import annotations

import weakref
from typing import Any


class LeftOutHooks:
    """ModelPatchers whose weights are not yet what their ``current_hooks`` ask for."""

    def __init__(self) -> None:
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._makes_up = False

    @property
    def may_be_left_out(self) -> bool:
        """Whether this is not the very call that makes up for others."""
        return not self._makes_up

    def leave_out(self, patcher: Any, hooks: Any) -> None:
        """Note hooks instead of applying them."""
        patcher.current_hooks = hooks
        self._waiting.add(patcher)

    def forget(self, patcher: Any) -> None:
        """ComfyUI applies other hooks to these weights."""
        self._waiting.discard(patcher)

    def make_up(self) -> None:
        """Have ComfyUI apply what was left out: its own copies of models are about to be read."""
        while self._waiting:
            patcher = self._waiting.pop()
            self._makes_up = True
            try:
                patcher.patch_hooks(patcher.current_hooks)
            finally:
                self._makes_up = False

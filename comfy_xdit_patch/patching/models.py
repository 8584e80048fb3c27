"""Remember which file each model came from.

Runs in: host process.

ComfyUI 0.33 keeps the loader and its arguments on the patcher, 0.3.75 keeps nothing, so the two
loaders are wrapped. A model that came any other way has no source and runs on one GPU.
"""

from __future__ import annotations

import itertools
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.transport.messages import ModelSource

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model's number for the workers and where they find its weights."""

    number: int
    source: ModelSource


class ModelRegistry:
    """Sources of the models alive in the host; forgets a model with its last reference."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, KnownModel | Refusal] = (
            weakref.WeakKeyDictionary()
        )
        self._numbers = itertools.count(1)

    def remember(self, base_model: Any, loader: str, path: str, options: dict[str, Any]) -> None:
        """Note where a model came from.

        Args:
            base_model: ComfyUI's ``BaseModel``, shared by all clones of its patcher.
            options: the loader's ``model_options``.
        """
        plain: dict[str, Any] = {}
        for name, value in options.items():
            if isinstance(value, torch.dtype):
                plain[name] = str(value)
            elif isinstance(value, _PLAIN):
                plain[name] = value
            else:
                self._known[base_model] = Refusal(f"the model was loaded with its own {name}")
                return
        stat = os.stat(path)
        source = ModelSource(loader, os.path.abspath(path), plain, stat.st_size, stat.st_mtime_ns)
        self._known[base_model] = KnownModel(next(self._numbers), source)

    def find(self, base_model: Any) -> KnownModel | Refusal:
        """Return the source of a model, or why it has none."""
        return self._known.get(
            base_model,
            Refusal("the model was not loaded from a file by Load Diffusion Model or Checkpoint"),
        )

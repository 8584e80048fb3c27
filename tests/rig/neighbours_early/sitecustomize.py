"""A package that wraps ComfyUI's functions before we do, from the start of the interpreter.

Runs in: every Python process of a test server, workers too (first on PYTHONPATH; the rig's own
``sitecustomize`` runs after it).

``RIG_EARLY_LOG`` names a file that gets one line for each function when it is called first.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = {
    "comfy.ldm.flux.model": ("Flux._forward", "Flux.forward"),
    "comfy.model_base": ("BaseModel._apply_model", "BaseModel.apply_model"),
    "comfy.samplers": ("CFGGuider.outer_sample",),
    "comfy.model_management": ("free_memory", "load_models_gpu"),
    "comfy.model_patcher": ("ModelPatcher.partially_load",),
    "comfy.sd": ("load_diffusion_model",),
}
_busy: set[str] = set()
_said: set[str] = set()


def _around(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def early(*args: Any, **kwargs: Any) -> Any:
        if name not in _said:
            _said.add(name)
            with open(os.environ["RIG_EARLY_LOG"], "a") as log:
                log.write(f"{name} {type(original).__name__}\n")
        return original(*args, **kwargs)

    return early


class Finder:
    """Wrap a module's functions right after it was executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find the module as the others would."""
        if name not in PLACES or name in _busy:
            return None
        _busy.add(name)
        try:
            spec: Any = importlib.util.find_spec(name)
        finally:
            _busy.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for place in PLACES[name]:
                owner: Any = module
                *path, attribute = place.split(".")
                for part in path:
                    owner = getattr(owner, part)
                setattr(owner, attribute, _around(place, getattr(owner, attribute)))

        spec.loader.exec_module = exec_module
        return spec


if "RIG_EARLY_LOG" in os.environ:
    sys.meta_path.insert(0, Finder())
here = Path(__file__).parent
# The next one on the path, which is hidden by this one's name.
for folder in sys.path:
    other = Path(folder) / "sitecustomize.py"
    if other.is_file() and other.parent.resolve() != here.resolve():
        spec = importlib.util.spec_from_file_location("sitecustomize_of_the_rig", other)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        break

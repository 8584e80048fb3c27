"""Start with the interpreter, wait for ComfyUI, and stay out of the way of everything else.

Runs in: every Python process of the environment, from ``comfy_xdit_patch.pth``.

Four facts shape this file.
    It runs in pip, in tests and in tools: standard library and names only, well under 2 ms, no
        output.
    ``site`` executes the lines of a .pth file twice in a virtual environment: ``start`` is
        idempotent.
    An exception here, or in an import hook, would break somebody else's program: none escapes.
    An import hook cannot be withdrawn by others: ours hears only of the modules named below, is
        deaf to everything else, and leaves each module's real loader in place.
"""

import os
import sys

from comfy_xdit_patch.marks import SETS, WORKER_MARK

# ``typing`` alone would cost several times what all of this does, and ``__future__`` a quarter.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_finder: "_Finder | None" = None


def start() -> None:
    """Register the import hook once, unless the user switched the package off. Never raises."""
    global _finder
    try:
        if _finder is None and not _is_switched_off():
            _finder = _Finder()
            sys.meta_path.insert(0, _finder)
    except Exception:  # noqa: BLE001 - interpreter start of a program that is not ours
        pass


def _is_switched_off() -> bool:
    # Read here and not through settings.py: "off" must cost no import, and a wrong value is
    # reported later, by ComfyUI's logger, once we know that this process is ComfyUI.
    environ = os.environ
    return (
        WORKER_MARK in environ
        or environ.get("XDIT_STRATEGY", "").strip().lower() == "off"
        or environ.get("XDIT_GPUS", "").strip() == "0"
    )


class _Finder:
    """A meta path finder that finds nothing itself, and notes when ComfyUI's modules are ready."""

    def __init__(self) -> None:
        self.waiting = set().union(*SETS)
        self.ready: dict[str, str] = {}

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        if name not in self.waiting:
            return None
        try:
            return self._watched_spec(name, path, target)
        except Exception:  # noqa: BLE001 - the import of ComfyUI must go on without us
            return None

    def _watched_spec(self, name: str, path: "Any", target: "Any") -> "ModuleSpec | None":
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                root = _comfyui_root(name, spec.origin)
                if root is not None and spec.loader is not None:
                    self._watch(name, root, spec.loader)
                return spec
        return None

    def _watch(self, name: str, root: str, loader: "Any") -> None:
        # The loader object serves this one module. Shadowing its method on the instance keeps
        # ``module.__loader__`` and ``__spec__`` what they are without us.
        execute = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            del loader.exec_module
            execute(module)
            self.waiting.discard(name)
            self._module_ready(name, root)

        loader.exec_module = exec_module

    def _module_ready(self, name: str, root: str) -> None:
        try:
            self.ready[name] = root
            for names in SETS:
                if name in names and all(self.ready.get(other) == root for other in names):
                    from comfy_xdit_patch.host.guest import activation

                    activation.modules_ready(names, root)
        except Exception:
            import logging

            logging.getLogger(__name__).exception("xDiT: could not start; ComfyUI goes on alone")


def _comfyui_root(name: str, origin: "str | None") -> "str | None":
    """Tell ComfyUI's modules from others of the same generic names, by path and neighbours."""
    if origin is None or not origin.endswith(os.path.join(*name.split(".")) + ".py"):
        return None
    root = os.path.abspath(origin)
    for _ in name.split("."):
        root = os.path.dirname(root)
    marks = ("execution.py", "nodes.py", os.path.join("comfy", "model_patcher.py"))
    return root if all(os.path.isfile(os.path.join(root, mark)) for mark in marks) else None


start()

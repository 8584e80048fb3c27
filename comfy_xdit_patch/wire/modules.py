"""Name a module so that another process finds it, and the code that is written in it.

Runs in: host and worker.

A node pack's modules are imported without the pack's ``__init__``, which would register nodes:
ComfyUI names a pack's package after its directory, so an empty package of that name and path stands
in for it. Only what is written in the ``__init__`` itself, or in a pack of one file, needs that
file to be run; its name is a path, so it is found by its file.

Code is found by its place in the source that the module was imported from: decorators, names among
siblings and what a name stands for by now do not matter.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator

from comfy_xdit_patch.wire.messages.requests import Tree

OWN_NODES = "comfy_extras"

Place = tuple[int, ...]
"""Way from a module's code to one inside of it: positions among the constants of each."""

_places: dict[int, tuple[types.CodeType, Place]] = {}
_codes: dict[tuple[str, Place], tuple[types.ModuleType, types.CodeType]] = {}
# What was found before, by the identity of what was asked for, which stays with it.


def canonical_module(name: str) -> str:
    """Return the name under which another process imports a module.

    ComfyUI loads its own nodes from their files, under the file's bare name.
    """
    file = _file_of(name)
    folder, base = os.path.split(file)
    if os.path.basename(folder) == OWN_NODES and base.endswith(".py"):
        return f"{OWN_NODES}.{base[:-3]}"
    return name


def encode_module(name: str) -> Tree:
    """Name a module, its file, and the packages around it, outermost first."""
    name = canonical_module(name)
    parts = name.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts))]
    packages = [
        [outer, [str(path) for path in getattr(sys.modules[outer], "__path__", ())]]
        for outer in around
        if "/" in outer and outer in sys.modules
    ]
    return [name, _file_of(name), packages]


def decode_module(tree: Tree) -> types.ModuleType:
    """Import a module named by ``encode_module``."""
    name, file, packages = tree
    for outer, paths in packages:
        if outer not in sys.modules:
            stand_in = types.ModuleType(outer)
            stand_in.__path__ = paths
            sys.modules[outer] = stand_in
    found = sys.modules.get(name)
    if file and "/" in name and not packages and getattr(found, "__spec__", None) is None:
        return _run_file(name, file)
    return importlib.import_module(name)


def _run_file(name: str, file: str) -> types.ModuleType:
    """Import what has no name to be imported by, as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def place_of(code: types.CodeType, module: types.ModuleType | None) -> Place | None:
    """Where in a module's source a code is written, or None: it is not, or not any more."""
    known = _places.get(id(code))
    if known is None:
        whole = source_of(module)
        place = None if whole is None else next(_search(whole, code, ()), None)
        if place is None:
            return None
        known = _places[id(code)] = code, place
    return known[1]


def source_of(module: types.ModuleType | None) -> types.CodeType | None:
    """The code of a module as a whole, read again, or None where it has none."""
    spec = getattr(module, "__spec__", None)
    get_code = getattr(getattr(spec, "loader", None), "get_code", None)
    if spec is None or get_code is None:
        return None
    try:
        code: types.CodeType | None = get_code(spec.name)
    except (ImportError, OSError, SyntaxError):
        return None
    return code


def code_at(module: types.ModuleType, place: Place) -> types.CodeType | None:
    """What is written at a place of a module."""
    known = _codes.get((module.__name__, place))
    if known is not None and known[0] is module:
        return known[1]
    code = source_of(module)
    for position in place:
        inner = code.co_consts[position] if code and position < len(code.co_consts) else None
        code = inner if isinstance(inner, types.CodeType) else None
    if code is not None:
        _codes[module.__name__, place] = module, code
    return code


def _search(whole: types.CodeType, code: types.CodeType, way: Place) -> Iterator[Place]:
    for position, const in enumerate(whole.co_consts):
        if isinstance(const, types.CodeType):
            if const == code:
                yield (*way, position)
            yield from _search(const, code, (*way, position))


def _file_of(name: str) -> str:
    return str(getattr(sys.modules.get(name), "__file__", None) or "")

"""Read names out of code objects: those that functions look up, and globals that they set.

Runs in: worker process.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator

from comfy_xdit_patch.transport.describing import codes_in

_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]


def words_in(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function's code, and in functions in it."""
    for one in codes_in(code):
        yield from one.co_names


def stored_by_functions(module: types.ModuleType) -> set[str]:
    """Names that functions of a module declare ``global`` and set: its state."""
    stored = set()
    for value in list(vars(module).values()):
        if isinstance(value, types.FunctionType) and value.__globals__ is vars(module):
            for code in codes_in(value.__code__):
                for *_, op, argument in dis._unpack_opargs(code.co_code):  # type: ignore[attr-defined]
                    if op == _STORE_GLOBAL:
                        stored.add(code.co_names[argument])
    return stored

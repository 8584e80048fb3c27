"""Find what the code of a model reaches: functions, methods, classes and constants, by name.

Runs in: worker process. Reads modules, changes nothing.

A node pack may replace anything of the host's process: torch's attention, a layer's method, a
constant. A rank has ComfyUI and torch as they were imported, so it is the one to say what a forward
reaches and what each of these things is; the host looks whether its own are the same
(``host/weights/likeness.py``).

The walk begins with the classes of the modules. A function reaches the globals that its code
names, and the attributes of modules among them. A class reaches what it inherits under a name that
some code names, and its operators. So the walk finds more than a step calls. It finds less only
where code looks something up by a text that it makes.
"""

from __future__ import annotations

import argparse
import dis
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from comfy_xdit_patch.blame import inner_of
from comfy_xdit_patch.planning.ways_in import WAYS
from comfy_xdit_patch.wire.describing import codes_in, contents_of, description, found
from comfy_xdit_patch.wire.messages.requests import is_plain

_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]


WALKED = (
    *("comfy", "comfy_kitchen", "einops"),
    *("torch.nn", "torch.functional", "torch._tensor", "torch.overrides"),
)
"""Packages whose functions are followed. Of other functions only a replacement is seen."""
NOT_COMPUTED_WITH = (
    *("comfy.memory_management", "comfy.pinned_memory", "comfy_aimdo"),
    *("torch.cuda", "torch.xpu", "torch.ops", "torch.jit", "torch.hub"),
    *("logging", "sys", "os", "gc", "threading", "time", "warnings", "weakref", "enum"),
)
"""Modules that place weights or write logs: no part of a result. The host alone has comfy-aimdo."""
MANAGEMENT = "comfy.model_management"
TORCHS_OWN = ("torch.nn.modules.module:Module", "__init__")
"""torch.compile puts a function of its own here, which counts modules."""
TENSORS = ("torch:Tensor", "torch.nn.parameter:Parameter", "einops._backends:TorchBackend")
"""Classes that all code reaches; einops looks for its own among their subclasses."""
WEIGHTS = (
    "comfy.lora:calculate_weight",
    "comfy.model_patcher:LowVramPatch",
    *(f"comfy.weight_adapter.{name}" for name in ("base:WeightAdapterBase", "lora:LoRAAdapter")),
    *(f"comfy.weight_adapter.{name}" for name in ("loha:LoHaAdapter", "lokr:LoKrAdapter")),
    *(f"comfy.weight_adapter.{name}" for name in ("oft:OFTAdapter", "boft:BOFTAdapter")),
    *("comfy.weight_adapter.glora:GLoRAAdapter", "comfy.weight_adapter.bypass:BypassForwardHook"),
)
"""What weight patches are applied with."""
BY_TEXT = "comfy_kitchen.backends"
"""Modules whose functions are looked up by names that are texts: those of torch's operators."""


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


Names = dict[str, dict[str, str]]
"""By container (a module, or ``module:path`` of something in it) and name: descriptions."""

WHERE = re.compile("pin|cache|stream|free|load|mmap|memory|sync|evict|interrupt|get_torch_device")
"""The same among the names of ``comfy.model_management``."""
EXPORT = "dlpack"
"""In names: what hands a tensor's memory to another library as it is."""
NO_OPERATORS = re.compile(
    "__(doc|module|dict|weakref|annotations|qualname|repr|str|format|hash|dir|sizeof"
    "|getstate|setstate|reduce|reduce_ex|copy|deepcopy|init_subclass|subclasshook)__"
)
"""What a forward does not call: texts, copies."""


def reached(in_blocks: Iterable[str], around: Iterable[str]) -> tuple[Names, Names]:
    """Return what the code of a model reaches: of its blocks, and what is around them alone.

    Args:
        in_blocks: classes of the modules in its blocks, ``module:path``. What no module here has
            is left out: a node pack's own classes are compared with the weights.
        around: of the others, and of the model itself.
    """
    walk = _Walk()
    walk.add_all([*TENSORS, *WEIGHTS, *in_blocks])
    of_blocks = walk.names()
    walk.add_all([*around, *(f"{path}._forward" for path in around)])
    of_all = walk.names()
    rest = {
        container: {
            name: text for name, text in names.items() if name not in of_blocks.get(container, ())
        }
        for container, names in of_all.items()
    }
    return of_blocks, {container: names for container, names in rest.items() if names}


class _Walk:
    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Any] = {}
        self._words: set[str] = set()
        """All names in the code that was walked."""
        self._classes: dict[type[Any], frozenset[str]] = {}
        self._seen: set[int] = set()
        self._todo: list[Any] = []
        self._texts: dict[tuple[str, str], str] = {}
        self._stored: dict[str, set[str]] = {}
        self._by_text: dict[str, list[tuple[str, Any]]] = {}
        for module in [name for name in sys.modules if _is_in(name, (BY_TEXT,))]:
            for word, value in vars(sys.modules[module]).items():
                if isinstance(value, types.FunctionType):
                    self._by_text.setdefault(word, []).append((module, value))

    def add(self, value: Any) -> None:
        self._todo.append(value)
        while self._todo:
            self._visit(self._todo.pop())

    def add_all(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.add(found(path))

    def names(self) -> Names:
        """Return what was found and can be described, but for state."""
        names: Names = {}
        for (container, name), value in self._found.items():
            if (container, name) not in self._texts:
                is_state = self._is_state(container, name, value)
                self._texts[container, name] = "" if is_state else description(value)
            if self._texts[container, name]:
                names.setdefault(container, {})[name] = self._texts[container, name]
        return names

    def _is_state(self, container: str, name: str, value: Any) -> bool:
        """Whether a module's own functions set it while they work; a cache, or a counter."""
        if ":" in container or callable(value) or isinstance(value, types.ModuleType):
            return False
        if container not in self._stored:
            self._stored[container] = stored_by_functions(sys.modules[container])
        return name in self._stored[container] or _is_empty_table(name, value)

    def _visit(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if _is_in(value.__globals__.get("__name__", ""), WALKED):
                self._function(value)
        elif isinstance(value, type):
            if _is_in(value.__module__, WALKED):
                self._class(value)
            return
        inner = inner_of(value)
        if inner is not None:
            self._todo.append(inner)

    def _bind(self, container: str, name: str, value: Any) -> None:
        if _is_in(container.partition(":")[0], NOT_COMPUTED_WITH):
            return
        if (container == MANAGEMENT and WHERE.search(name)) or (container, name) == TORCHS_OWN:
            return
        if EXPORT in name:
            return
        if (container, name) not in self._found:
            self._found[container, name] = value
            self._todo.append(value)

    def _function(self, function: types.FunctionType) -> None:
        words = set(words_in(function.__code__))
        spaces: list[Any] = []
        module = function.__globals__.get("__name__", "")
        for word in words:
            if word in function.__globals__:
                self._bind(module, word, function.__globals__[word])
                spaces.append(function.__globals__[word])
            elif word in sys.modules:
                spaces.append(sys.modules[word])  # imported inside of the function
        self._todo += contents_of(function)
        looked_at: set[int] = set()
        while spaces:
            space = spaces.pop()
            if id(space) in looked_at:
                continue
            looked_at.add(id(space))
            if isinstance(space, types.ModuleType):
                for word in words & vars(space).keys():
                    self._bind(space.__name__, word, vars(space)[word])
                    spaces.append(vars(space)[word])
            elif isinstance(space, dict):  # a table of functions
                self._todo += filter(callable, list(space.values()))
            elif isinstance(space, argparse.Namespace):  # plain ones are sent, and set here
                for word in words & vars(space).keys():
                    if not is_plain(vars(space)[word]):
                        self._bind("comfy.cli_args:args", word, vars(space)[word])
        new = words - self._words
        self._words |= words
        for word in new & self._by_text.keys():
            for space, value in self._by_text[word]:
                self._bind(space, word, value)
        for cls, names in list(self._classes.items()):
            for name in names & new:
                self._member(cls, name)

    def _class(self, cls: type[Any]) -> None:
        new = [one for one in cls.__mro__ if one not in self._classes and _has_a_name(one)]
        self._seen.update(map(id, new))
        self._classes.update((one, frozenset(dir(one))) for one in new)
        for one in new:
            for name in self._classes[one]:
                if name in self._words or _is_operator(name):
                    self._member(one, name)

    def _member(self, cls: type[Any], name: str) -> None:
        """Bind what a class has under a name, and that nothing hides what it inherits."""
        definer = next((one for one in cls.__mro__ if name in vars(one)), object)
        if definer is object or _is_of_family(cls, name):
            return
        for one in cls.__mro__:
            if one in self._classes:
                self._bind(f"{one.__module__}:{one.__qualname__}", name, vars(one).get(name))
            if one is definer:
                return


_IS_IMMUTABLE, _IS_HEAP_TYPE = 1 << 8, 1 << 9  # flags of CPython's types


def _is_empty_table(name: str, value: Any) -> bool:
    """A cache that is not filled yet. torch's hooks of all modules are empty, and no cache."""
    is_table = isinstance(value, (dict, list, set))
    return is_table and not value and not name.startswith("_global_")


def _has_a_name(cls: type[Any]) -> bool:
    """Whether a class can be found and changed by others: no C type, not made in a function."""
    can_change = cls.__flags__ & _IS_HEAP_TYPE and not cls.__flags__ & _IS_IMMUTABLE
    return bool(can_change) and found(f"{cls.__module__}:{cls.__qualname__}") is cls


def _is_of_family(cls: type[Any], name: str) -> bool:
    """Whether it is a model's way in: what lies above ``_forward`` has run in the host already."""
    return name in WAYS and "forward_orig" in vars(cls)


def _is_in(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _is_operator(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and not NO_OPERATORS.match(name)

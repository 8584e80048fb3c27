"""Find what a step calls in stock ComfyUI, and change it for the whole process as packs do.

Runs in: a ComfyUI process of ``process.py``.

A mutation is ``mechanism module:path``. The list is made of one traced step, not written by hand:
functions and methods by whoever called them, under every name that ComfyUI has for them; torch's
own functions and tensor methods; operators in the code that ran; constants and class attributes
that it reads; classes of its modules, before a model is loaded; numbers of its modules, one of each
kind; torch's settings. A changed function's floating-point results are scaled.
"""

from __future__ import annotations

import contextlib
import dis
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import forwards
import torch
from host_checks import CASE, _activation, _attribute, _call

PACKAGES = ("comfy", "comfy_kitchen", "einops", "torch.nn", "torch.functional")
OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "truediv", "@": "matmul"}
SCALE = 0.9
SETTINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default_dtype": lambda: _with(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "matmul_precision": lambda: _with(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "operator": lambda: _other_kernel("scaled_dot_product_attention"),
    "function_mode": lambda: _Scaling(),
}
_scale, _is_inside = torch.mul, [False]


def traced(path: str) -> list[str]:
    """Return the mutations that one step suggests, in an order of chance that is always the same.

    Mechanisms take turns.
    """
    codes, builtins = _calls_of(path)
    kinds: dict[str, set[str]] = {}

    def note(kind: str, where: str) -> None:
        kinds.setdefault(kind, set()).add(where)

    modules = {module.__name__: module for module in [*codes.values(), torch]}
    classes = {
        f"{cls.__module__}:{cls.__qualname__}": cls
        for module in forwards.patcher_of(path).model.diffusion_model.modules()
        for cls in type(module).__mro__[:-1]
        if "<locals>" not in cls.__qualname__
    }
    for where, cls in classes.items():
        _note_class(where, cls, codes, note)
    for name, module in modules.items():
        for key, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and value.__code__ in codes:
                note("function", f"{name}:{key}")
            elif isinstance(value, types.BuiltinFunctionType) and value in builtins:
                note("builtin", f"{name}:{key}")
    for code in codes:
        for instruction in dis.get_instructions(code):
            if instruction.opname == "BINARY_OP" and instruction.argrepr in OPERATORS:
                note("operator", f"torch:Tensor.__{OPERATORS[instruction.argrepr]}__")
        module = codes[code]
        for name in code.co_names:
            if type(vars(module).get(name)) in (bool, int, float):
                note("constant", f"{module.__name__}:{name}")
    for name in {item.__name__ for item in builtins if isinstance(item.__self__, torch.Tensor)}:
        note("tensor method", f"torch:Tensor.{name}")
    numbers: dict[tuple[type[Any], str], str] = {}
    for where, module in forwards.patcher_of(path).model.diffusion_model.named_modules():
        cls = type(module)
        if "<locals>" not in cls.__qualname__:
            note("class", f"{cls.__module__}:{cls.__qualname__}")
        for key, value in vars(module).items():
            if type(value) in (bool, int, float) and "comfy" not in key and key != "training":
                numbers.setdefault((cls, key), f"{where}:{key}")
    kinds["attribute"] = set(numbers.values())
    kinds["setting"] = set(SETTINGS)
    return _in_turns({kind: sorted(found) for kind, found in sorted(kinds.items())})


def _note_class(
    where: str, cls: type[Any], codes: dict[Any, Any], note: Callable[[str, str], None]
) -> None:
    for key, value in list(vars(cls).items()):
        inner = getattr(value, "__func__", value)
        if isinstance(inner, types.FunctionType) and inner.__code__ in codes:
            note("method", f"{where}.{key}")
        elif type(value) in (bool, int, float) and not key.startswith("__"):
            note("class attribute", f"{where}.{key}")


def _in_turns(kinds: dict[str, list[str]]) -> list[str]:
    for found in kinds.values():
        random.Random(0).shuffle(found)
    turns = []
    for turn in range(max(map(len, kinds.values()))):
        turns += [f"{kind} {found[turn]}" for kind, found in kinds.items() if turn < len(found)]
    return turns


def _calls_of(path: str) -> tuple[dict[Any, Any], list[Any]]:
    """Codes that a step runs, with their modules, and C functions that it calls."""
    patcher = forwards.patcher_of(path)
    patcher.pre_run()
    codes: dict[Any, Any] = {}
    builtins: list[Any] = []

    def profile(frame: types.FrameType, event: str, arg: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith(PACKAGES) and name in sys.modules:
            codes[frame.f_code] = sys.modules[name]
        elif event == "c_call" and name.startswith(PACKAGES):
            builtins.append(arg)

    with torch.inference_mode():
        arguments = forwards.inputs(patcher.model, **CASE)
        flux = patcher.model.diffusion_model
        forward = type(flux)._forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            sys.setprofile(profile)
            try:
                return forward(*args, **kwargs)
            finally:
                sys.setprofile(None)

        type(flux)._forward = watched
        try:
            patcher.model.apply_model(**arguments)
        finally:
            type(flux)._forward = forward
    return codes, [item for item in builtins if hasattr(item, "__self__")]


def mutated_call(path: str, out: str, mutation: str) -> dict[str, Any]:
    """One call while something is changed; or the error that it raised."""
    is_of_class = mutation.startswith("class ")
    flux = forwards.patcher_of(path).model.diffusion_model
    with changed(mutation, flux):
        try:
            return _call(path, out, patcher=_fresh(path) if is_of_class else None)
        except BaseException as error:  # noqa: BLE001 - a mutation may break ComfyUI itself
            return {"error": f"{type(error).__name__}: {error}"}


def _fresh(path: str) -> Any:
    """A model of the classes that are there now."""
    return comfy.sd.load_diffusion_model(path)


def differences(path: str, out: str, mutations: list[str]) -> dict[str, Any]:
    """One call with many changes at once, and all names that are not the ranks'."""
    with contextlib.ExitStack() as stack:
        for mutation in mutations:
            stack.enter_context(changed(mutation))
        counts = _call(path, out)
        likeness = _likeness(_activation().host.pool.crew)
        names = [item.reason for one in likeness.compared for item in one.changes(is_first=True)]
    return {**counts, "names": names}


def _likeness(crew: Any) -> Any:
    """What was compared with these ranks."""
    from comfy_xdit_patch.host.weights.likeness import Likeness

    return crew.of(Likeness)


def cost_of_looking(path: str, out: str) -> dict[str, float]:
    """Milliseconds in which a run looks before its first step, and a step while ranks compute.

    Medians of looks between which the caches of the processor were used for something else.
    """
    _call(path, out)
    from comfy_xdit_patch.host.call import Call

    host = _activation().host
    base = forwards.patcher_of(path).model
    crew = host.pool.crew
    likeness = _likeness(crew)
    seconds: dict[str, list[float]] = {"run": [], "before a step": [], "meanwhile": []}
    others = torch.zeros(16 << 20)
    for number in range(200):
        is_first = number % 10 == 0
        if is_first:
            run = host.begin_run()
        others += 1
        call = Call(base.diffusion_model, base, {}, run)
        begin = time.perf_counter()
        assert likeness.changes(crew, call) == []
        looked = time.perf_counter()
        assert likeness.late_change(crew) is None
        if is_first:
            seconds["run"].append(looked - begin)
        else:
            seconds["before a step"].append(looked - begin)
            seconds["meanwhile"].append(time.perf_counter() - looked)
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


def changed_in_a_run(path: str, out: str, mutation: str) -> dict[str, Any]:
    """Three calls of one run; something is another one in the last two of them."""
    patcher = forwards.patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    host = _activation().host if "comfy_xdit_patch.host.guest.activation" in sys.modules else None
    run = host.begin_run() if host else None
    token = host.current_run.set(run) if host else None
    results = []
    with contextlib.ExitStack() as stack, torch.inference_mode():
        arguments = forwards.inputs(patcher.model, **CASE)
        for number in range(3):
            if number == 1:
                stack.enter_context(changed(mutation))
            results.append(patcher.model.apply_model(**arguments, transformer_options={}))
    torch.save(torch.stack(results), out)
    if host is None:
        return {}
    host.current_run.reset(token)
    host.end_run(run)
    counts = run.counts
    return {"parallel": len(counts.parallel_seconds), "fell_back": dict(counts.fall_backs)}


@contextlib.contextmanager
def changed(mutation: str, flux: Any = None) -> Iterator[None]:
    """Change one thing while this lasts, of the model ``flux`` or of the process."""
    kind, _, where = mutation.rpartition(" ")
    if kind == "attribute":
        name, _, key = where.partition(":")
        module = flux.get_submodule(name)
        with _attribute(module, key, _changed(vars(module)[key])):
            yield
        return
    if kind == "setting":
        with SETTINGS[where]():
            yield
        return
    module, _, path = where.partition(":")
    owner: Any = sys.modules[module]
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    before = vars(owner).get(name)
    is_special = isinstance(before, (staticmethod, classmethod))
    with _attribute(owner, name, _changed(before if is_special else getattr(owner, name))):
        yield


def _changed(value: Any) -> Any:
    if isinstance(value, type):
        forward = _scaling(value.forward)
        return type(value.__name__, (value,), {"forward": forward, "__module__": __name__})
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_scaling(value.__func__))
    return _scaling(value)


def _scaling(function: Callable[..., Any]) -> Callable[..., Any]:
    def scaling(*args: Any, **kwargs: Any) -> Any:
        return _scaled(function(*args, **kwargs))

    return scaling


def _scaled(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_scaled(item) for item in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or _is_inside[0]:
        return value
    _is_inside[0] = True
    try:
        return _scale(value, SCALE)
    finally:
        _is_inside[0] = False


@contextlib.contextmanager
def _with(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _other_kernel(operator: str) -> Iterator[None]:
    """Put a kernel of Python's under one of torch's operators."""
    inner = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def kernel(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return _scaled(inner(q, k, v)[0])

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(operator, kernel, "CPU")
        yield


class _Scaling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_attention = func is torch.nn.functional.scaled_dot_product_attention
        return _scaled(out) if is_attention else out

"""Bodies that look at, disturb and switch off our side of a ComfyUI process.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.flux.model
import comfy.model_management
import forwards
import torch
import wrapt

CASE = {"height": 16, "width": 12, "batch": 1, "text_tokens": 256}


def ours_in_process() -> dict[str, Any]:
    """What of ours is in this process: wrapped points and imported modules."""
    from comfy_xdit_patch.host.guest.points import sampling_points  # the table only

    points = sampling_points(types.SimpleNamespace(**dict.fromkeys(WRAPPER_NAMES)))  # type: ignore[arg-type]
    kinds = {}
    for point in points:
        owner, name, _ = wrapt.resolve_path(importlib.import_module(point.module), point.attribute)
        kinds[point.name] = type(vars(owner)[name]).__name__
    return {
        "points": kinds,
        "activation_imported": "comfy_xdit_patch.host.guest.activation" in sys.modules,
        "finder": any(type(f).__module__.startswith("comfy_xdit") for f in sys.meta_path),
    }


WRAPPER_NAMES = (
    "flux_forward",
    "apply_model",
    "outer_sample",
    "load_diffusion_model",
    "load_checkpoint",
    "free_memory",
    "load_models",
    "partially_load",
    "patch_hooks",
)


def modules_of_ours() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("comfy_xdit_patch"))


def _activation() -> Any:
    from comfy_xdit_patch.host.guest.activation import ACTIVATION

    return ACTIVATION


def _call(path: str, out: str, patcher: Any = None, **transformer_options: Any) -> dict[str, Any]:
    """One model call as samplers make it; returns what our counters say of it."""
    patcher = patcher or forwards.patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    host = _activation().host if "comfy_xdit_patch.host.guest.activation" in sys.modules else None
    before = (host.totals.steps_parallel, dict(host.totals.fall_backs)) if host else (0, {})
    with torch.inference_mode():
        arguments = forwards.inputs(patcher.model, **CASE)
        result = patcher.model.apply_model(**arguments, transformer_options=transformer_options)
    torch.save(result, out)
    if host is None:
        return {}
    reasons = {
        reason: count - before[1].get(reason, 0)
        for reason, count in host.totals.fall_backs.items()
        if count != before[1].get(reason, 0)
    }
    return {"parallel": host.totals.steps_parallel - before[0], "fell_back": reasons}


def plain_call(path: str, out: str) -> dict[str, Any]:
    return _call(path, out)


def compiled_call(path: str, out: str) -> dict[str, Any]:
    """The whole diffusion model compiled, as ComfyUI's and other packs' compile nodes do."""
    patcher = forwards.patcher_of(path).clone()
    original = patcher.model.diffusion_model
    compiled = torch.compile(original, backend="eager")
    patcher.model.diffusion_model = compiled
    try:
        # ComfyUI's own node swaps the module only while apply_model runs; the call below goes
        # through the compiled module like any call of a node pack that leaves it in place.
        return _call(path, out, patcher)
    finally:
        patcher.model.diffusion_model = original


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    old = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if old is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


def disturbed_call(path: str, out: str, kind: str) -> dict[str, Any]:
    """Change something as a node pack does, call, and change it back."""
    patcher = forwards.patcher_of(path).clone()
    flux = patcher.model.diffusion_model
    layers, math = comfy.ldm.flux.layers, comfy.ldm.flux.math
    block = flux.double_blocks[0]
    if kind == "lora":
        key = "diffusion_model.single_blocks.0.linear2.weight"
        shape = flux.single_blocks[0].linear2.weight.shape
        patcher.add_patches({key: ("diff", (torch.full(shape, 0.01),))}, 1.0)
        try:
            return _call(path, out, patcher)
        finally:
            patcher.detach()
    if kind == "forward_orig":
        replaced = types.MethodType(_passing_on(type(flux).forward_orig), flux)
        with _attribute(flux, "forward_orig", replaced):
            return _call(path, out)
    if kind in WAYS_IN:
        with WAYS_IN[kind](flux):
            return _call(path, out, patcher)
    if kind == "object patch around the blocks":
        patcher.add_object_patch("diffusion_model.pe_embedder", Halved(flux.pe_embedder))
        try:
            patcher.patch_model()
            return _call(path, out, patcher)
        finally:
            patcher.unpatch_model()
    if kind == "forward_orig restored":
        # What ComfyUI leaves after an object patch was taken back.
        with _attribute(flux, "forward_orig", flux.forward_orig):
            return _call(path, out)
    if kind == "number of a block":
        with _attribute(block.img_norm1, "eps", 0.5):
            return _call(path, out)
    if kind == "number around the blocks":
        with _attribute(flux.pe_embedder, "theta", 100):
            return _call(path, out)
    if kind == "block class":
        changed = type("OtherBlock", (type(block),), {})
        block.__class__ = changed
        try:
            return _call(path, out)
        finally:
            block.__class__ = changed.__mro__[1]
    if kind == "block method":
        cls = layers.SingleStreamBlock
        with _attribute(cls, "forward", _passing_on(cls.forward)):
            return _call(path, out)
    if kind == "attention function":
        with _attribute(layers, "attention", _passing_on(layers.attention)):
            return _call(path, out)
    if kind == "optimized attention":
        with _attribute(math, "optimized_attention", _passing_on(math.optimized_attention)):
            return _call(path, out)
    if kind == "module hook":
        handle = block.register_forward_hook(lambda *_: None)
        try:
            return _call(path, out)
        finally:
            handle.remove()
    if kind == "edited weight":
        weight = flux.single_blocks[0].linear2.weight
        with torch.inference_mode(False), torch.no_grad():
            weight.mul_(2.0)
        try:
            return _call(path, out)
        finally:
            with torch.inference_mode(False), torch.no_grad():
                weight.mul_(0.5)
    if kind == "attention override":

        def override(function: Any, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return _call(path, out, optimized_attention_override=override)
    if kind == "block patch":

        def replace(args: Any, extra: Any) -> Any:
            return extra["original_block"](args)

        return _call(path, out, patches_replace={"dit": {("double_block", 0): replace}})
    if kind == "multigpu":
        return _call(path, out, multigpu_thread_device="cpu")
    raise ValueError(kind)


class Halved(torch.nn.Module):
    """A module of a pack's in the place of ComfyUI's: DyPE's positions are one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids / 2)


def _own_code(name: str) -> Callable[..., torch.Tensor]:
    """A pack's own copy of one of ComfyUI's functions, which does not come to our wrapper."""
    function = vars(comfy.ldm.flux.model.Flux)[name]
    function = getattr(function, "__wrapped__", function)

    def own(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(self, *args, **kwargs) * 0.98

    return own


@contextmanager
def _own_class(flux: Any, **methods: Any) -> Iterator[None]:
    stock = type(flux)
    flux.__class__ = type("Quieter", (stock,), methods)
    try:
        yield
    finally:
        flux.__class__ = stock


def _twice(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A guidance of its own: ComfyUI's forward is called for each part of it."""
    forward = type(self).forward
    return forward(self, x, *args, **kwargs) * 0.7 + forward(self, x * 0.9, *args, **kwargs) * 0.3


def failing_call(path: str, out: str, is_given_tokens: bool) -> dict[str, Any]:
    """A call of a model whose ``forward_orig`` is for another ComfyUI, and fails."""
    flux = forwards.patcher_of(path).model.diffusion_model
    calls = []

    def failing(self: Any, img: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        calls.append(self.img_in(img) if is_given_tokens else img)
        raise KeyError("of the pack's own")

    before = dict(_activation().host.totals.fall_backs)
    raised = ""
    with _attribute(flux, "forward_orig", types.MethodType(failing, flux)):
        try:
            _call(path, out)
        except KeyError as error:
            raised = str(error)
    after = _activation().host.totals.fall_backs
    fell_back = [reason for reason in after if after[reason] != before.get(reason, 0)]
    return {"raised": raised, "times": len(calls), "fell_back": fell_back}


WAYS_IN: dict[str, Callable[[Any], Any]] = {
    "forward of a subclass": lambda flux: _own_class(flux, forward=_own_code("_forward")),
    "_forward of a subclass": lambda flux: _own_class(flux, _forward=_own_code("_forward")),
    "forward_orig of a subclass": lambda flux: _own_class(
        flux, forward_orig=_own_code("forward_orig")
    ),
    "subclass with nothing of its own": _own_class,
    "forward of the class": lambda flux: _attribute(type(flux), "forward", _own_code("_forward")),
    "forward of the object": lambda flux: _attribute(
        flux, "forward", types.MethodType(_own_code("_forward"), flux)
    ),
    "forward that calls ComfyUI's twice": lambda flux: _attribute(
        flux, "forward", types.MethodType(_twice, flux)
    ),
    "module around the blocks": lambda flux: _modules(flux, pe_embedder=Halved(flux.pe_embedder)),
    "layer around the blocks": lambda flux: _modules(flux, txt_in=Doubled(flux.txt_in)),
}
"""What packs put between ComfyUI's call of a model and its blocks."""


class Doubled(Halved):
    """One that has weights, under other names."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) * 2


@contextmanager
def _modules(flux: Any, **modules: Any) -> Iterator[None]:
    stock = {name: getattr(flux, name) for name in modules}
    for name, module in modules.items():
        setattr(flux, name, module)
    try:
        yield
    finally:
        for name, module in stock.items():
            setattr(flux, name, module)


def _passing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    def passing_on(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return passing_on


# Every function of ours that ComfyUI's process runs in a call or a run.
HOST_FUNCTIONS = (
    "comfy_xdit_patch.host.guest.host:Host.forward",
    "comfy_xdit_patch.host.guest.host:Host.attempt",
    "comfy_xdit_patch.host.guest.host:Host.counted",
    "comfy_xdit_patch.host.step.step:misplaced",
    "comfy_xdit_patch.host.step.step:ParallelSteps.run",
    "comfy_xdit_patch.host.step.step:ParallelSteps._read",
    "comfy_xdit_patch.host.step.step:ParallelSteps._computed",
    "comfy_xdit_patch.host.step.step:carry",
    "comfy_xdit_patch.host.step.step:checked",
    "comfy_xdit_patch.host.weights.holding:Holding.changes",
    "comfy_xdit_patch.host.weights.holding:Holding.has_changed_file",
    "comfy_xdit_patch.host.guest.host:Host.begin_run",
    "comfy_xdit_patch.host.guest.host:Host.end_run",
    "comfy_xdit_patch.host.step.call_plans:CallPlans.of_call",
    "comfy_xdit_patch.host.call:workload_of",
    "comfy_xdit_patch.host.step.call_plans:plan_call",
    "comfy_xdit_patch.host.step.call_plans:no_ring",
    "comfy_xdit_patch.host.pace.rank_speeds:CrewBalance.weights",
    "comfy_xdit_patch.host.pace.rank_speeds:CrewBalance.measured",
    "comfy_xdit_patch.host.step.step:check_arguments",
    "comfy_xdit_patch.host.step.step:check_patcher",
    "comfy_xdit_patch.host.guest.wrappers:Wrappers._bind",
    "comfy_xdit_patch.host.step.whole_call:RemoteForward.forward",
    "comfy_xdit_patch.host.step.whole_call:RemoteForward._count",
    "comfy_xdit_patch.host.weights.held:RemoteWeights.state",
    "comfy_xdit_patch.host.weights.held:RemoteWeights.load",
    "comfy_xdit_patch.host.weights.held:RemoteWeights._ask",
    "comfy_xdit_patch.host.reading.comparing:Comparisons.begin",
    "comfy_xdit_patch.host.reading.weight_states:WeightStates.of",
    "comfy_xdit_patch.host.weights.residency:Residency.place",
    "comfy_xdit_patch.host.weights.one_owner:SharedMemory.ran",
    "comfy_xdit_patch.host.weights.holding:Holding.fitting",
    "comfy_xdit_patch.host.weights.holding:Holding.hold",
    "comfy_xdit_patch.host.pool.crew:Crew.of",
    "comfy_xdit_patch.host.pool.crew:Crew.turn",
    "comfy_xdit_patch.host.pool.crew:Turn.send",
    "comfy_xdit_patch.host.pool.crew:check_answers",
    "comfy_xdit_patch.host.reading.models:ModelRegistry.find",
    "comfy_xdit_patch.host.reading.eligibility:Pristine.check_step",
    "comfy_xdit_patch.host.reading.eligibility:Pristine.check_modules",
    "comfy_xdit_patch.wire.slots:SlotTable.place",
    "comfy_xdit_patch.wire.slots:SlotTable.result_slot",
    "comfy_xdit_patch.host.weights.holding:Holding.come_up",
    "comfy_xdit_patch.host.pool.exchange:Exchange._collect",
    "comfy_xdit_patch.host.pool.exchange:Exchange._check",
    "comfy_xdit_patch.host.pool.exchange:Exchange._send_all",
)


class PlantedError(Exception):
    """A fault that nobody expects."""


def planted_call(path: str, out: str, where: str) -> dict[str, Any]:
    """Run a call while one function of ours raises."""
    module, _, qualified = where.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = qualified.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    calls = []

    def planted(*args: Any, **kwargs: Any) -> Any:
        calls.append(where)
        raise PlantedError(where)

    with _attribute(owner, name, planted):
        counted = _run_of_one_call(path, out)
    return {**counted, "planted": len(calls)}


def _run_of_one_call(path: str, out: str) -> dict[str, Any]:
    """A call inside a sampling run, through our wrapper of ``CFGGuider.outer_sample``."""
    import comfy.samplers

    class OneCallGuider(comfy.samplers.CFGGuider):
        pass

    guider = OneCallGuider.__new__(OneCallGuider)
    result: dict[str, Any] = {}

    def body(*_: Any, **__: Any) -> None:
        result.update(_call(path, out))

    # The wrapper is asked for by name and given a function of the same shape to wrap around.
    activation = _activation()
    wrapper = next(p.wrapper for p in activation.sampling.points if "outer_sample" in p.attribute)
    wrapper(body, guider, (), {})
    return result


def direct_call(path: str, kind: str) -> list[str]:
    """A run in which a node calls parts of the model, or nothing at all; the reasons counted."""
    import comfy.samplers

    patcher = forwards.patcher_of(path).clone()
    comfy.model_management.load_models_gpu([patcher])
    flux = patcher.model.diffusion_model

    def calling(*_: Any) -> None:
        width = flux.hidden_size
        img, txt = torch.zeros(1, 4, width), torch.zeros(1, 2, width)
        pe = flux.pe_embedder(torch.zeros(1, 6, 3))
        flux.double_blocks[0](img=img, txt=txt, vec=torch.zeros(1, width), pe=pe)

    guider = comfy.samplers.CFGGuider(patcher)
    if kind == "blocks":
        patcher.set_model_unet_function_wrapper(calling)
        guider = comfy.samplers.CFGGuider(patcher)

    def body(noise: Any, latent_image: Any, sampler: Any, sigmas: Any) -> None:
        if kind == "blocks":
            with torch.inference_mode():
                calling()

    before = dict(_activation().host.totals.fall_backs)
    points = _activation().sampling.points
    wrapper = next(p.wrapper for p in points if "outer_sample" in p.attribute)
    wrapper(body, guider, (None, None, None, torch.zeros(3)), {})
    after = _activation().host.totals.fall_backs
    return [reason for reason in after if after[reason] != before.get(reason, 0)]


def changed_file_call(path: str, out: str) -> dict[str, Any]:
    """The file is touched after ComfyUI read it and before the workers do."""
    import os
    import shutil

    copy = f"{out}.safetensors"
    shutil.copyfile(path, copy)
    patcher = forwards.patcher_of(copy)
    os.utime(copy)
    counts = _call(copy, out, patcher)
    return {**counts, "state": forwards.status()["state"], "error": forwards.status()["last_error"]}


def wrapped_on_top(path: str, out: str) -> dict[str, Any]:
    """Somebody wraps after us; we switch off and on; theirs stays, and ours obeys."""
    seen: list[str] = []

    def theirs(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        seen.append("theirs")
        return wrapped(*args, **kwargs)

    flux_class = comfy.ldm.flux.model.Flux
    ours = vars(flux_class)["_forward"]
    sampling = _activation().sampling
    flux_class._forward = wrapt.FunctionWrapper(ours, theirs)
    try:
        on = _call(path, out)
        sampling.uninstall()
        off = _call(path, out)
        sampling.install()
        again = _call(path, out)
    finally:
        flux_class._forward = ours
    return {"on": on, "off": off, "again": again, "theirs": len(seen)}


def worker_pids() -> list[int]:
    return [worker.process.pid for worker in _activation().host.pool.crew.workers]

"""Whether one call of FLUX's forward is exactly what the workers would compute.

Runs in: host. Reads ComfyUI's objects, changes nothing.

The workers run ComfyUI's own forward on the model's own file. Whatever a node pack, a LoRA or a
user changed between the file and this call must therefore be seen here, or the image would
silently differ: everything is refused that is not known to be carried over. Two scans: a cheap
one for every step, a full one of all modules once a run. They look at this one model; what was
changed for the whole process is found by ``host/weights/likeness.py``.

ComfyUI's ``BypassForwardHook`` puts itself in the place of a layer's ``forward`` and calls what it
found there (comfy/weight_adapter/bypass.py, from 0.33). It works on one token at a time, so the
workers are given its adapter and make the same hook on their own layer.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from comfy_xdit_patch.blame import origin
from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.reading.compiled import original
from comfy_xdit_patch.planning.family import BLOCK_LISTS, CONTROL, MEMBERS
from comfy_xdit_patch.planning.ways_in import WAYS, WaysIn
from comfy_xdit_patch.wire.decoders import MODULE as DECODER_MODULE

BLOCK_CLASSES = ("DoubleStreamBlock", "SingleStreamBlock")
FLUX_LAYERS_MODULE = "comfy.ldm.flux.layers"
OWNERS = ("comfy", "comfy_kitchen", "torch")
CARRIED_OBJECTS = ("diffusion_model.params.default_ref_method",)
"""Object patches whose value is an argument of the call."""
CARRIED_HOOKS = ("weight", "transformer_options", "add_models")
"""Types of ComfyUI's hooks: patches of weights, options of the call, models beside this one."""


MODULE = "comfy.weight_adapter.bypass"


class Pristine:
    """ComfyUI's own classes as they were when ComfyUI imported them, before any node pack ran.

    ``forward`` and ``_forward`` of a model are not looked at: when our wrapper is reached, whatever
    lies above it has run in this process already. What lies below runs in the workers.
    """

    def __init__(self, modules: Mapping[str, types.ModuleType]) -> None:
        """Remember the classes in ``sys.modules``, or in a part with ``comfy.ldm.flux.*``."""
        layers = modules[FLUX_LAYERS_MODULE]
        self._block_classes = tuple(getattr(layers, name) for name in BLOCK_CLASSES)
        self.bypass = BypassCode(modules)
        self.ways = WaysIn(modules)
        self.control_class: type[Any] | None = None
        self.decoder: type[Any] | None = None
        """Of VAEs."""
        self._members: set[type[Any]] = {
            getattr(modules[member.module], member.name)
            for member in MEMBERS
            if member.module in modules
        }

    def remember_controls(self, modules: Mapping[str, types.ModuleType]) -> None:
        """The same for ComfyUI's ControlNets, which are imported later."""
        self.control_class = getattr(modules[CONTROL.module], CONTROL.name)
        self._members.add(self.control_class)

    def remember_decoder(self, modules: Mapping[str, types.ModuleType]) -> None:
        """The same for ComfyUI's decoder of VAEs."""
        self.decoder = modules[DECODER_MODULE].Decoder

    def is_member(self, flux: Any) -> bool:
        """Whether a model's class is one of the family's own, or made from one of them."""
        return self.ways.class_of(flux) is not None

    def reads(self, flux: Any, kind: str) -> bool:
        """Whether this model's code, or its blocks', reads a kind of model patch."""
        functions = [vars(cls).get("forward_orig") for cls in type(flux).__mro__]
        functions += [cls.__dict__["forward"] for cls in self._block_classes]
        codes = [getattr(function, "__code__", None) for function in functions]
        return any(code is not None and kind in code.co_consts for code in codes)

    def check_step(self, flux: Any) -> list[Refusal]:
        """See what node packs changed in a model and its blocks. Every step."""
        own_class = type(flux) if type(flux) in self._members else self.ways.class_of(flux)
        if own_class is None:
            return [Refusal(f"the diffusion model is no FLUX but {origin(flux)}")]
        found = []
        if own_class is not type(flux):
            found.append(
                Refusal(
                    f"the diffusion model's class was changed to {origin(flux)}",
                    is_around_blocks=True,
                )
            )
        found += [
            Refusal(f"a node replaced {name} of this model by {origin(own)}", is_around_blocks=True)
            for name, own in _shadowing(flux)
            if name not in WAYS
        ]
        found += [
            Refusal(f"a node replaced a block of this model by {origin(block)}")
            for block in (*flux.double_blocks, *flux.single_blocks)
            # A compiled block stands in for the one it was made from.
            if type(original(block)) not in self._block_classes
        ]
        if getattr(flux, "skip_mmdit", None) or getattr(flux, "skip_dit", None):
            found.append(Refusal("a node has the model skip blocks", is_around_blocks=True))
        return found

    def check_modules(self, flux: Any) -> list[Refusal]:
        """See what node packs put on single modules. Once a run."""
        found = []
        for name, module in flux.named_modules():
            is_block = name.split(".")[0] in BLOCK_LISTS
            is_compiled = original(module) is not module
            is_foreign = self.bypass.hooks_on(module) is None
            if is_foreign and not is_compiled and module is not flux:
                found.append(
                    Refusal(
                        f"a node replaced the forward of {without_index(name)} by "
                        f"{origin(module.__dict__['forward'])}",
                        is_around_blocks=not is_block,
                    )
                )
            if module is not flux:
                found += [
                    Refusal(
                        f"a node replaced {other} of {without_index(name)} by {origin(own)}",
                        is_around_blocks=not is_block,
                    )
                    for other, own in _shadowing(module)
                    if other != "forward"
                ]
            hooks = {**module._forward_hooks, **module._forward_pre_hooks}
            if hooks:
                found.append(
                    Refusal(
                        f"a forward hook is set on {without_index(name) or 'the model'}: "
                        f"{origin(next(iter(hooks.values())))}",
                        # Hooks of a block as a whole are called around it.
                        is_around_blocks=not is_block or name.count(".") == 1,
                    )
                )
        return found + self._foreign(flux)

    def _foreign(self, flux: Any) -> list[Refusal]:
        """Modules around the blocks that are neither ComfyUI's nor of the kinds in the blocks."""
        named = [(name, type(module)) for name, module in _parts(flux)]
        in_blocks = {cls.__module__ for name, cls in named if name.split(".")[0] in BLOCK_LISTS}
        return [
            Refusal(
                f"a node put {origin(cls)} in the place of {without_index(name)}",
                is_around_blocks=True,
            )
            for name, cls in named
            if cls.__module__.split(".")[0] not in OWNERS and cls.__module__ not in in_blocks
        ]


def _parts(flux: Any) -> Iterator[tuple[str, Any]]:
    parts = ((name, module) for name, module in flux.named_modules() if module is not flux)
    return ((name, original(module)) for name, module in parts)


def _shadowing(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield the methods that a module has of its own, in the place of those of its class."""
    cls = type(module)
    for name, own in vars(module).items():
        stock = inspect.getattr_static(cls, name) if hasattr(cls, name) else None
        # An object patch that was taken back leaves the bound original behind as an attribute:
        # compare functions, not presence.
        if callable(stock) and getattr(own, "__func__", own) is not stock:
            yield name, own


def check_patcher(base_model: Any, bypass: BypassCode) -> list[Refusal]:
    """See what the current ModelPatcher changed in the weights or the module."""
    patcher = base_model.current_patcher
    if patcher is None:
        return [Refusal("the model has no current ModelPatcher")]
    found = []
    if getattr(patcher, "weight_wrapper_patches", None):
        found.append(Refusal("the model has weight wrappers"))
    if getattr(patcher, "is_injected", False):
        found += [
            Refusal(f"a node injected code into the model's modules: {origin(injection.inject)}")
            for injections in patcher.injections.values()
            for injection in injections
            if not bypass.makes(injection)
        ]
    for hook in getattr(getattr(patcher, "current_hooks", None), "hooks", ()):
        kind = getattr(hook.hook_type, "value", hook.hook_type)
        if kind not in CARRIED_HOOKS:
            found.append(Refusal(f"a hook of type {kind} is set on the model"))
    for key in patcher.object_patches:
        root, *path = key.split(".")
        if root != "diffusion_model" or key in CARRIED_OBJECTS:
            continue
        if hasattr(patcher.object_patches[key], "_orig_mod"):
            continue  # compiled; what it was made from is looked at like any other
        found.append(
            Refusal(
                f"a node patched {without_index(key)} of the model by "
                f"{origin(patcher.object_patches[key])}",
                is_around_blocks=bool(path) and path[0] not in BLOCK_LISTS,
            )
        )
    return found


def blocking(refusals: Iterable[Refusal]) -> Refusal | None:
    """Return the first refusal that keeps even the blocks from running on the workers."""
    return next((one for one in refusals if not one.is_around_blocks), None)


def without_index(name: str) -> str:
    """``double_blocks.7.img_mlp`` -> ``double_blocks.N.img_mlp``: one reason, not 57."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


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

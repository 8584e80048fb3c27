"""Whether one call of FLUX's forward is exactly what the workers would compute.

Runs in: host. Reads ComfyUI's objects, changes nothing.

The workers run ComfyUI's own forward on the model's own file. Whatever a node pack, a LoRA or a
user changed between the file and this call must therefore be seen here, or the image would
silently differ: everything is refused that is not known to be carried over. Two scans: a cheap
one for every step, a full one of all modules once a run.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comfy_xdit_patch.blame import whose
from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.planning.bypass import BypassCode
from comfy_xdit_patch.planning.family import CONTROL, FLUX_LAYERS, MEMBERS, Member

BLOCK_CLASSES = ("DoubleStreamBlock", "SingleStreamBlock")
FLUX_LAYERS_MODULE = "comfy.ldm.flux.layers"
FUNCTIONS = {
    "comfy.ldm.flux.layers": ("attention", "apply_mod", "timestep_embedding"),
    "comfy.ldm.flux.math": ("optimized_attention", "apply_rope", "rope"),
    "comfy.ldm.flux.model": ("timestep_embedding",),
}
CARRIED_ARGUMENTS = (
    "x",
    "timestep",
    "context",
    "y",
    "guidance",
    "ref_latents",
    "ref_latents_method",
    "control",
    "attention_mask",
)
BLOCK_LISTS = ("double_blocks", "single_blocks")
# Classes whose ``forward`` runs inside of a block.
PARTS_OF_BLOCKS = (*BLOCK_CLASSES, "Modulation", "QKNorm")
CARRIED_OBJECTS = ("diffusion_model.params.default_ref_method",)
"""Object patches whose value is an argument of the call."""
CARRIED_HOOKS = ("weight", "transformer_options", "add_models")
"""Types of ComfyUI's hooks: patches of weights, options of the call, models beside this one."""
# ComfyUI's FLUX reads "input" and "output"; "middle" is always there and never read.
CARRIED_CONTROLS = ("input", "middle", "output")


class Pristine:
    """ComfyUI's own FLUX code as it was when ComfyUI imported it, before any node pack ran.

    ``forward`` and ``_forward`` of a model are not looked at: when our wrapper is reached, whatever
    lies above it has run in this process already. What lies below runs in the workers.
    """

    def __init__(self, modules: Mapping[str, types.ModuleType]) -> None:
        """Remember them, of ``sys.modules`` or a part of it that holds ``comfy.ldm.flux.*``."""
        layers = modules[FLUX_LAYERS_MODULE]
        self._block_classes = tuple(getattr(layers, name) for name in BLOCK_CLASSES)
        self.bypass = BypassCode(modules)
        self.control_class: type[Any] | None = None
        self._members: dict[type[Any], Member] = {}
        self._methods: list[tuple[type[Any], str, Any]] = []
        self._remember_layers(modules, {FLUX_LAYERS_MODULE: FLUX_LAYERS})
        for member in MEMBERS:
            if member.module in modules:
                self._remember(modules, member)
        self._functions = [
            (modules[module], name, getattr(modules[module], name))
            for module, names in FUNCTIONS.items()
            for name in names
            if hasattr(modules[module], name)
        ]

    def remember_controls(self, modules: Mapping[str, types.ModuleType]) -> None:
        """The same for ComfyUI's ControlNets, which are imported later."""
        self.control_class = self._remember(modules, CONTROL)

    def _remember(self, modules: Mapping[str, types.ModuleType], member: Member) -> type[Any]:
        cls: type[Any] = getattr(modules[member.module], member.name)
        self._members[cls] = member
        self._methods += _own_methods(cls, member.methods)
        self._remember_layers(modules, member.layers)
        return cls

    def _remember_layers(
        self, modules: Mapping[str, types.ModuleType], layers: Mapping[str, Sequence[str]]
    ) -> None:
        for module, names in layers.items():
            for name in names:
                if hasattr(modules[module], name):
                    self._methods += _own_methods(getattr(modules[module], name), ("forward",))

    def is_member(self, flux: Any) -> bool:
        """Whether a model is of one of the family's own classes, and of no subclass."""
        return type(flux) in self._members and type(flux) is not self.control_class

    def reads(self, flux: Any, kind: str) -> bool:
        """Whether this model's code, or its blocks', reads a kind of model patch."""
        codes = [inspect.getattr_static(type(flux), "forward_orig").__code__]
        codes += [cls.__dict__["forward"].__code__ for cls in self._block_classes]
        return any(kind in code.co_consts for code in codes)

    def check_step(self, flux: Any) -> list[Refusal]:
        """See what others changed in FLUX's code: classes, methods, functions. Every step."""
        if type(flux) not in self._members:
            return [Refusal(f"the diffusion model's class was changed to {type(flux).__name__}")]
        found = []
        for cls, name, function in self._methods:
            now = cls.__dict__.get(name)
            if now is not function:
                is_around = cls.__name__ not in PARTS_OF_BLOCKS
                path = f"{cls.__module__}.{cls.__name__}.{name}"
                found.append(_replaced(path, now, is_around_blocks=is_around))
        for module, name, function in self._functions:
            now = getattr(module, name, None)
            if now is not function:
                found.append(_replaced(f"{module.__name__}.{name}", now))
        for name in self._members[type(flux)].methods:
            # An object patch that was taken back leaves the bound original behind as an instance
            # attribute: compare functions, not presence.
            own = flux.__dict__.get(name)
            stock = inspect.getattr_static(type(flux), name, None)
            if own is not None and getattr(own, "__func__", own) is not stock:
                found.append(
                    Refusal(f"a node replaced {name} of this model", is_around_blocks=True)
                )
        found += [
            Refusal(f"a node replaced a block of this model by {type(block).__name__}")
            for block in (*flux.double_blocks, *flux.single_blocks)
            # A compiled block stands in for the one it was made from.
            if type(getattr(block, "_orig_mod", block)) not in self._block_classes
        ]
        if getattr(flux, "skip_mmdit", None) or getattr(flux, "skip_dit", None):
            found.append(Refusal("a node has the model skip blocks", is_around_blocks=True))
        return found

    def check_modules(self, flux: Any) -> list[Refusal]:
        """See what others hung on single modules. Once a run."""
        found = []
        for name, module in flux.named_modules():
            is_block = name.split(".")[0] in BLOCK_LISTS
            is_compiled = hasattr(module, "_orig_mod")
            is_foreign = self.bypass.hooks_on(module) is None
            if is_foreign and not is_compiled and module is not flux:
                found.append(
                    Refusal(
                        f"a node replaced the forward of {_without_index(name)}",
                        is_around_blocks=not is_block,
                    )
                )
            if module._forward_hooks or module._forward_pre_hooks:
                found.append(
                    Refusal(
                        f"a forward hook is set on {_without_index(name) or 'the model'}",
                        # Hooks of a block as a whole are called around it.
                        is_around_blocks=not is_block or name.count(".") == 1,
                    )
                )
        return found


def _replaced(path: str, now: Any, *, is_around_blocks: bool = False) -> Refusal:
    return Refusal(f"{path} was replaced by {whose(now)}", is_around_blocks=is_around_blocks)


def _own_methods(cls: type[Any], names: Sequence[str]) -> list[tuple[type[Any], str, Any]]:
    return [(cls, name, cls.__dict__[name]) for name in names if name in cls.__dict__]


def check_patcher(base_model: Any, bypass: BypassCode) -> list[Refusal]:
    """See what the current ModelPatcher changed in the weights or the module."""
    patcher = base_model.current_patcher
    if patcher is None:
        return [Refusal("the model has no current ModelPatcher")]
    found = []
    if getattr(patcher, "weight_wrapper_patches", None):
        found.append(Refusal("the model has weight wrappers"))
    if getattr(patcher, "is_injected", False) and not all(
        bypass.makes(injection)
        for injections in patcher.injections.values()
        for injection in injections
    ):
        found.append(Refusal("a node injected code into the model's modules"))
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
                f"a node patched {_without_index(key)} of the model",
                is_around_blocks=bool(path) and path[0] not in BLOCK_LISTS,
            )
        )
    return found


def check_arguments(arguments: Mapping[str, Any]) -> list[Refusal]:
    """See whether the workers can be given everything that this call's result depends on.

    Other keyword arguments than the carried ones are swallowed by ``Flux._forward`` unread; what
    nodes set in ``transformer_options`` is looked at by ``patching/carried.py``.
    """
    found = []
    if "multigpu_thread_device" in (arguments.get("transformer_options") or {}):
        found.append(Refusal("ComfyUI's own MultiGPU split is active", Scope.STEP))
    found += [
        Refusal(f"a ControlNet has {name} residuals", Scope.STEP)
        for name in arguments.get("control") or ()
        if name not in CARRIED_CONTROLS
    ]
    return found


def check_grad(x: Any) -> list[Refusal]:
    """See whether this is training: gradients do not cross processes."""
    import torch

    if torch.is_grad_enabled() and x.requires_grad:
        return [Refusal("gradients are wanted", Scope.STEP)]
    return []


def check_forward(flux: Any) -> list[Refusal]:
    """See why a call did not come to ``_forward``, if a node is the reason."""
    own = vars(flux).get("forward")
    stock = inspect.getattr_static(type(flux), "forward", None)
    if own is None or getattr(own, "__func__", own) is stock:
        return []
    return [Refusal("a node put a forward of its own on the whole model", Scope.STEP)]


def blocking(refusals: Iterable[Refusal]) -> Refusal | None:
    """Return the first refusal that keeps even the blocks from running on the workers."""
    return next((refusal for refusal in refusals if not refusal.is_around_blocks), None)


def _without_index(name: str) -> str:
    """``double_blocks.7.img_mlp`` -> ``double_blocks.N.img_mlp``: one reason, not 57."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))

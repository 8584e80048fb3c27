"""Carry a model that has no file: its configuration, its operations, and its weights in packs.

Runs in: host (``describe``) and worker (``build``).

A node that reads its own file format (GGUF) or makes weights of its own leaves nothing that a
worker could load. The module can be made again from ComfyUI's model configuration and the
operations class; what the modules hold is carried by name, tensor subclasses taken apart.
``state_dict()`` is not asked: GGUF's is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.wire.fingerprint import StoredWeight, stored_weights
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.packs import Packing, PackTable
from comfy_xdit_patch.wire.tensors import PLAIN_CLASSES, Form, as_parameter
from comfy_xdit_patch.wire.values import PLAIN, decode_value, encode_value, refuse

# Made by the class itself, or by us below.
_CONFIG_OMITS = ("latent_format", "custom_operations", "unet_config")
# Set by PyTorch or by ComfyUI's loading of weights; the worker's own loading sets them there.
_MODULE_OMITS = ("training", "_is_full_backward_hook", "compute_dtype")


def describe(base_model: Any, flux: Any, packs: PackTable) -> Tree:
    """Describe a model completely; its weights are placed in shared memory.

    Raises:
        UncarriedValueError: a part of the model cannot be carried.
        ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
    """
    config, patcher = base_model.model_config, base_model.current_patcher
    operations = config.custom_operations
    packing = Packing()

    def other(path: str, value: Any) -> Tree:
        if not isinstance(value, StoredWeight):
            return refuse(path, value)
        parts, form = value.parts
        nodes = {part: packing.add(value.cast(plain)) for part, plain in parts.items()}
        kind = None if form.cls in PLAIN_CLASSES else (form.cls, form.is_wrapper)
        return {"$weight": [nodes, encode_value(kind), encode_value(form.stored_values)]}

    described = {
        "config": type(config),
        "unet_config": config.unet_config,
        "attributes": {n: v for n, v in vars(config).items() if n not in _CONFIG_OMITS},
        "operations": None if operations is None else _operations(operations),
        "patcher": _patcher(patcher),
        "modules": {
            name: attributes
            for name, module in flux.named_modules()
            if (attributes := _plain_attributes(module))
        },
        "weights": {weight.name: weight for weight in stored_weights(flux, patcher)},
    }
    tree = encode_value(described, other)
    packing.place(partial(packs.place, owner=base_model))
    return tree


def _operations(operations: Any) -> tuple[type[Any], dict[str, Any]]:
    """An operations class, and what a node has set on its layers' classes."""
    cls = operations if isinstance(operations, type) else type(operations)
    layers = {
        name: {k: v for k, v in _plain(layer).items() if not k.startswith("__")}
        for name, layer in vars(cls).items()
        if isinstance(layer, type)
    }
    return cls, layers


def _patcher(patcher: Any) -> tuple[type[Any], dict[str, Any]] | None:
    """A node pack's own ModelPatcher class, and its plain settings."""
    import comfy.model_patcher

    if type(patcher).__module__ == comfy.model_patcher.__name__:
        return None
    own = {
        name
        for cls in type(patcher).__mro__
        if cls.__module__ not in (comfy.model_patcher.__name__, "builtins")
        for name in vars(cls)
    }
    settings = {
        name: value for name, value in vars(patcher).items() if name in own and type(value) in PLAIN
    }
    return type(patcher), settings


def _plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in _plain(module).items()
        if name not in _MODULE_OMITS and "comfy_" not in name
    }


def _plain(owner: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(owner).items()
        if type(value) in PLAIN or isinstance(value, torch.dtype)
    }


def build(description: Tree, tensor: Callable[[Tree], torch.Tensor]) -> Any:
    """Make the ModelPatcher that ``describe`` described.

    Args:
        tensor: finds the tensor behind a place.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.utils

    made = decode_value(description, {"$pack": tensor, "$weight": partial(_join, tensor)})
    # A class of configurations may change what it is made of.
    config = made["config"](decode_value(description["unet_config"]))
    for name, value in made["attributes"].items():
        setattr(config, name, value)
    config.unet_config = made["unet_config"]
    if made["operations"] is not None:
        config.custom_operations, layers = made["operations"]
        for layer, attributes in layers.items():
            for name, value in attributes.items():
                setattr(getattr(config.custom_operations, layer), name, value)
    model = config.get_model({}, "")
    modules = dict(model.diffusion_model.named_modules())
    for name, attributes in made["modules"].items():
        for key, value in attributes.items():
            setattr(modules[name], key, value)
    for name, weight in made["weights"].items():
        _put(modules, name, weight)
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    if made["patcher"] is not None:
        cls, settings = made["patcher"]
        patcher = cls.clone(patcher)
        for name, value in settings.items():
            setattr(patcher, name, value)
    return patcher


def _join(tensor: Callable[[Tree], torch.Tensor], inner: Tree) -> torch.Tensor:
    parts, kind, values = decode_value(inner, {"$pack": tensor})
    cls, is_wrapper = kind or (torch.Tensor, False)
    return Form(cls, is_wrapper, values).join(parts)


def _put(modules: Mapping[str, Any], name: str, tensor: torch.Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    owner = modules[module]
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        setattr(owner, attribute, as_parameter(tensor))

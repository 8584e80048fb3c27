"""Carry a model that has no file: its configuration, its operations, and its weights in packs.

Runs in: host (``describe``) and worker (``build``).

A node that reads its own file format (GGUF) or makes weights of its own leaves nothing that a
worker could load. The module can be made again from ComfyUI's model configuration and the
operations class; what the modules hold is carried by name, tensor subclasses taken apart.
``state_dict()`` is not asked: GGUF's is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from comfy_xdit_patch.wire.fingerprint import stored_weights
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.packs import PackTable
from comfy_xdit_patch.wire.tensors import PLAIN_CLASSES, Form, as_parameter
from comfy_xdit_patch.wire.values import (
    PLAIN,
    decode_class,
    decode_value,
    encode_class,
    encode_value,
)

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
    parts: list[torch.Tensor] = []
    weights: dict[str, Tree] = {}
    for weight in stored_weights(flux, patcher):
        inner, form = weight.parts
        indices = {part: len(parts) + i for i, part in enumerate(inner)}
        weights[weight.name] = {"form": _form(form), "parts": indices}
        parts += map(weight.cast, inner.values())
    places = packs.place(parts, owner=base_model)
    for tree in weights.values():
        tree["parts"] = {part: places[index] for part, index in tree["parts"].items()}
    operations = config.custom_operations
    return {
        "config": encode_class(type(config)),
        "unet_config": encode_value(config.unet_config),
        "attributes": {
            name: encode_value(value)
            for name, value in vars(config).items()
            if name not in _CONFIG_OMITS
        },
        "operations": None if operations is None else _operations(operations),
        "patcher": _patcher(patcher),
        "modules": {
            name: attributes
            for name, module in flux.named_modules()
            if (attributes := _plain_attributes(module))
        },
        "weights": weights,
    }


def _form(form: Form) -> Tree:
    if form.cls in PLAIN_CLASSES:
        return None
    return [encode_class(form.cls), form.is_wrapper, encode_value(form.stored_values)]


def _operations(operations: Any) -> Tree:
    """An operations class, and what a node has set on its layers' classes."""
    cls = operations if isinstance(operations, type) else type(operations)
    layers = {
        name: encode_value(
            {
                key: value
                for key, value in vars(layer).items()
                if not key.startswith("__")
                and (type(value) in PLAIN or isinstance(value, torch.dtype))
            }
        )
        for name, layer in vars(cls).items()
        if isinstance(layer, type)
    }
    return {"class": encode_class(cls), "layers": layers}


def _patcher(patcher: Any) -> Tree:
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
    return {"class": encode_class(type(patcher)), "attributes": encode_value(settings)}


def _plain_attributes(module: torch.nn.Module) -> dict[str, Tree]:
    return {
        name: encode_value(value)
        for name, value in vars(module).items()
        if (type(value) in PLAIN or isinstance(value, torch.dtype))
        and name not in _MODULE_OMITS
        and "comfy_" not in name
    }


def build(description: Tree, tensor: Callable[[Tree], torch.Tensor]) -> Any:
    """Make the ModelPatcher that ``describe`` described.

    Args:
        tensor: finds the tensor behind a place.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.utils

    config = decode_class(description["config"])(decode_value(description["unet_config"]))
    for name, value in description["attributes"].items():
        setattr(config, name, decode_value(value))
    config.unet_config = decode_value(description["unet_config"])
    operations = description["operations"]
    if operations is not None:
        config.custom_operations = decode_class(operations["class"])
        for layer, attributes in operations["layers"].items():
            for name, value in decode_value(attributes).items():
                setattr(getattr(config.custom_operations, layer), name, value)
    model = config.get_model({}, "")
    modules = dict(model.diffusion_model.named_modules())
    for name, attributes in description["modules"].items():
        for key, value in attributes.items():
            setattr(modules[name], key, decode_value(value))
    for name, weight in description["weights"].items():
        _put(modules, name, _join(weight, tensor))
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    own = description["patcher"]
    if own is not None:
        patcher = decode_class(own["class"]).clone(patcher)
        for name, value in decode_value(own["attributes"]).items():
            setattr(patcher, name, value)
    return patcher


def _join(weight: Tree, tensor: Callable[[Tree], torch.Tensor]) -> torch.Tensor:
    parts = decode_value(weight["parts"], {"$pack": tensor})
    if weight["form"] is None:
        plain: torch.Tensor = parts[""]
        return plain
    cls, is_wrapper, values = weight["form"]
    return Form(decode_class(cls), is_wrapper, decode_value(values)).join(parts)


def _put(modules: Mapping[str, Any], name: str, tensor: torch.Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    owner = modules[module]
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        setattr(owner, attribute, as_parameter(tensor))

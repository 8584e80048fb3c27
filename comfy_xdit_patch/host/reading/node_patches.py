"""What nodes put into ``transformer_options``: which of it the workers can be given, and how.

Runs in: host process. Reads ComfyUI's objects, changes nothing.

The rule (docs/compatibility.md has it as a table):
    a patch known to work on any part of the tokens runs on every rank's own tokens;
    another one runs on every rank with all tokens gathered, if its source is found there again and
        it keeps nothing from call to call;
    what works around the blocks (before them, between them, instead of one) runs here, as it
        always does, and the blocks run on the ranks (``host/step/block_calls.py``);
    anything else is refused with its reason.
What FLUX never reads changes nothing.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_xdit_patch.blame import origin
from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.wire.describing import codes_in
from comfy_xdit_patch.wire.functions import (
    closed_over,
    encode_callable,
    is_stateful,
    name_of,
    undisabled,
)
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.values import PLAIN, UncarriedValueError

OVERRIDE = "optimized_attention_override"
IN_BLOCKS = ("attn1_patch", "attn1_output_patch")
BLOCKS = ("double_block", "single_block")

# By module and path: they look at each token alone, or at what is passed on of the whole.
NATIVE = {
    ("comfy_extras.nodes_nag", "NAGuidance.execute.<locals>.nag_attention_output_patch"),
    ("comfy_extras.nodes_flux", "FluxKVCache.execute.<locals>.model_input_patch"),
    ("comfy_extras.nodes_flux", "KV_Attn_Input"),
}
SKIPS = {
    ("comfy_extras.nodes_slg", f"{node}.{method}.<locals>.skip")
    for node in ("SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple")
    for method in ("execute", "skip_guidance")
}
# Attention functions that look at no positions: ComfyUI's own, chosen by a node.
CHOOSERS = {
    (
        "comfy.model_patcher",
        "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override",
    )
}
ORDERLESS_MODULES = ("comfy.ldm.modules.attention",)


@dataclass(slots=True)
class CarriedPatches:
    """The patches of one call: a tree for the workers, and why they cannot be given all."""

    tree: dict[str, Any] | None = None
    refusals: list[Refusal] = field(default_factory=list)
    gathered: str | None = None
    """Why tokens are gathered on the workers."""
    keeps_references: bool = False
    """Every rank must hold a reference token, for a cache of their keys to be all of them."""

    @property
    def overrides_attention(self) -> bool:
        """Whether a node chose the attention function."""
        return self.tree is not None and self.tree["attention"] is not None

    def in_blocks(self) -> dict[str, Any] | None:
        """The part of the tree that blocks apply."""
        if self.tree is None:
            return None
        patches = {
            mode: {kind: of_kind for kind, of_kind in kinds.items() if kind in IN_BLOCKS}
            for mode, kinds in self.tree["patches"].items()
        }
        return {**self.tree, "patches": patches, "skip": []}


def carry(
    options: Mapping[str, Any], *, reads: Callable[[str], bool], numbers: Callable[[Any], int]
) -> CarriedPatches:
    """Sort the patches of a call.

    Args:
        options: ``transformer_options``.
        reads: whether this model's code reads a kind of patch at all.
        numbers: gives an object that keeps state its number for the workers.
    """
    carried = CarriedPatches()
    modes: dict[str, dict[str, list[Tree]]] = {"native": {}, "gathered": {}}
    for kind, patches in (options.get("patches") or {}).items():
        for patch in patches if reads(kind) else ():
            mode = "native" if name_of(patch) in NATIVE else "gathered"
            if kind not in IN_BLOCKS and mode == "gathered":
                carried.refusals.append(
                    Refusal(
                        f"a node set a {kind} patch, {origin(patch)}",
                        Scope.STEP,
                        is_around_blocks=True,
                    )
                )
                continue
            try:
                if mode == "gathered":
                    _check_keeps_nothing(patch)
                    carried.gathered = f"a node set a {kind} patch, {origin(patch)}"
                modes[mode].setdefault(kind, []).append(encode_callable(patch, numbers))
                carried.keeps_references |= is_stateful(patch)
            except UncarriedValueError as error:
                name = origin(patch)
                carried.refusals.append(
                    Refusal(f"a node set a {kind} patch, {name}: {error}", Scope.STEP)
                )
    skip = []
    for (name, number), patch in ((options.get("patches_replace") or {}).get("dit") or {}).items():
        if name not in BLOCKS:
            continue
        if name_of(patch) in SKIPS:
            skip.append([name, number])
        else:
            carried.refusals.append(
                Refusal(
                    f"a node replaces blocks by {origin(patch)}", Scope.STEP, is_around_blocks=True
                )
            )
    attention = None
    if options.get(OVERRIDE) is not None:
        try:
            function = options[OVERRIDE]
            _check_keeps_nothing(function)
            attention = {
                "function": encode_callable(function, numbers),
                "wants_order": not _is_orderless(function),
            }
        except UncarriedValueError as error:
            name = origin(options[OVERRIDE])
            carried.refusals.append(
                Refusal(f"a node overrides the attention function by {name}: {error}", Scope.STEP)
            )
    if any(modes.values()) or skip or attention is not None:
        carried.tree = {"patches": modes, "skip": skip, "attention": attention}
    return carried


def other_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What patches may read of ``transformer_options``; under "missing" what cannot be carried."""
    values: dict[str, Any] = {}
    missing = []
    for name, value in options.items():
        if name in ("patches", "patches_replace", "wrappers", "callbacks", OVERRIDE):
            continue
        if _is_plain(value):
            values[name] = value
        else:
            missing.append(name)
    return {"values": values, "missing": missing}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return type(value) in PLAIN or type(value) is torch.Tensor


def _is_orderless(function: Any) -> bool:
    """Whether a function only chooses one of ComfyUI's own attention functions."""
    return _is_comfyuis_attention(function) or (
        name_of(function) in CHOOSERS and all(map(_is_comfyuis_attention, closed_over(function)))
    )


def _is_comfyuis_attention(function: Any) -> bool:
    """Whether a function, and all that it closes over, is written in ComfyUI's attention module."""
    functions = list(_with_inner(function))
    return bool(functions) and all(name_of(one)[0] in ORDERLESS_MODULES for one in functions)


def _check_keeps_nothing(function: Any) -> None:
    """Raise UncarriedValueError if a function's next call may depend on this one."""
    for one in _with_inner(function):
        if name_of(one)[0] in ORDERLESS_MODULES:
            continue
        for code in codes_in(one.__code__):
            for instruction in dis.get_instructions(code):
                if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                    raise UncarriedValueError("a function that sets a global variable")
                stores = instruction.opname == "STORE_DEREF"
                if stores and instruction.argval in one.__code__.co_freevars:
                    raise UncarriedValueError("a function that keeps something between calls")
        if any(isinstance(value, (list, dict, set)) for value in _held_by(one)):
            raise UncarriedValueError("a function that may keep something between calls")


def _with_inner(value: Any) -> Iterator[types.FunctionType]:
    """A function and all that it holds, each once: functions may hold themselves."""
    left, seen = [value], set()
    while left:
        one = undisabled(left.pop())
        if isinstance(one, functools.partial):
            left += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, tuple):
            left += one
        elif isinstance(one, types.FunctionType) and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += _held_by(one)


def _held_by(function: types.FunctionType) -> list[Any]:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return [*closed_over(function), *defaults, *vars(function).values()]

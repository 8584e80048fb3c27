"""Which blocks of a model the user has compiled, and how, in a form that the ranks can be given.

Runs in: host process. Reads torch's objects, changes nothing.

A compiled module stands in for the one that it was made from: for the whole diffusion model
(ComfyUI's TorchCompileModel), or for single blocks (packs that name them). Ranks cannot compile the
model in one piece, because they exchange tokens in it, and compile all of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.wire.messages.requests import Tree, is_plain

T = TypeVar("T")
BACKENDS = ("inductor", "eager", "aot_eager")
"""Of Dynamo's, those that ranks use."""
CUDA_GRAPHS = ("triton.cudagraphs", "triton.cudagraph_trees")
"""Options of inductor's, by which modes ask for them too; exchanges cannot lie in one."""
KWARGS = "torch_compile_kwargs"
"""A model option that ComfyUI's own helper sets."""


def is_compiled(patcher: Any) -> bool:
    """Whether a ModelPatcher has its model, or parts of it, compiled when it is sampled."""
    options = getattr(patcher, "model_options", None) or {}
    patches = (getattr(patcher, "object_patches", None) or {}).values()
    return KWARGS in options or any(hasattr(patch, "_orig_mod") for patch in patches)


def as_compiled(base_model: Any, compute: Callable[[], T]) -> Callable[[], T]:
    """Have a call of a model that is compiled as a whole run so, from code that Dynamo leaves out.

    Ours is such code (``host/guest/wrappers.py``), and with it all that it calls.
    """
    context = getattr(getattr(base_model, "diffusion_model", None), "dynamo_ctx", None)
    return compute if context is None else context(compute)


def compiled_blocks(base_model: Any) -> Tree | Refusal:
    """Read what stands in for a model and its blocks now.

    Returns:
        Backend, inductor's options, ``dynamic`` and the names of blocks (None: all of them); None
        if nothing is compiled; or why the ranks run the blocks as they are.
    """
    found = dict(_stand_ins(base_model))
    if not found:
        return None
    first, *others = [_settings(module) for module in found.values()]
    if any(one != first for one in others):
        return Refusal("they are compiled in different ways")
    if isinstance(first, Refusal):
        return first
    return {**first, "blocks": None if "" in found else list(found)}


def original(module: Any) -> Any:
    """What a compiled module was made from; any other is itself. Asked of each block in each step.

    A module that is asked for an attribute which it does not have makes an exception's text first.
    """
    return getattr(module, "_modules", {}).get("_orig_mod", module)


def _stand_ins(base_model: Any) -> Iterator[tuple[str, Any]]:
    model = getattr(base_model, "diffusion_model", None)
    if original(model) is not model:
        yield "", model
        return
    for name in BLOCK_LISTS:
        for number, block in enumerate(getattr(model, name, ())):
            if original(block) is not block:
                yield f"{name}.{number}", block


def _settings(module: Any) -> dict[str, Any] | Refusal:
    """What ``torch.compile`` was given for a module; guards are each rank's own."""
    backend = getattr(getattr(module, "dynamo_ctx", None), "callback", None)
    while (behind := _behind(backend)) is not None:
        backend = behind
    name = getattr(backend, "compiler_name", None)
    if backend is None or name not in BACKENDS:
        return Refusal(f"ranks do not compile by the backend {name}")
    given = getattr(backend, "config", {})
    options = {key: value for key, value in given.items() if key not in CUDA_GRAPHS}
    unplain = next((key for key, value in options.items() if not is_plain(value)), None)
    if unplain is not None:
        return Refusal(f"the compiler's option {unplain} cannot be carried")
    return {"backend": name, "options": options, "dynamic": backend.dynamic}


def _behind(callback: Any) -> Any:
    """The next of the callables that Dynamo puts around a backend; its names differ by version."""
    names = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")
    found = (getattr(callback, name, None) for name in names)
    return next((one for one in found if one is not None), None)

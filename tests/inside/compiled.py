"""Bodies that call FLUX's forward with blocks compiled, as compile nodes of packs leave them.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from forwards import inputs, node_options, patched, patcher_of, sampling_run, status

WHOLE_MODEL = ""


def calls(
    path: str,
    out: str,
    calls: Sequence[dict[str, Any]],
    options: dict[str, Any] | None = None,
    **compiled: Any,
) -> list[dict[str, Any]]:
    """Make calls one after the other, and save what they return.

    Args:
        options: UNETLoader's model options.
        calls: sizes of each, and under ``weights`` and ``node`` whether weights are patched and
            what a node does.
        compiled: see ``compiled_parts``.

    Returns:
        Our status after each call.
    """
    results, found = [], []
    with torch.inference_mode():  # as ComfyUI loads; quantised weights cannot be moved otherwise
        plain = patcher_of(path, **(options or {}))
    for call in calls:
        sizes = {name: value for name, value in call.items() if name not in ("weights", "node")}
        patcher = patched(plain) if call.get("weights") else plain
        of_node = node_options(**{call["node"]: True}) if "node" in call else {}
        with torch.inference_mode():  # as ComfyUI patches; float8 cannot be otherwise
            comfy.model_management.load_models_gpu([patcher])
        patcher.pre_run()
        with torch.inference_mode(), compiled_parts(patcher.model, **compiled):
            given = inputs(patcher.model, **sizes)
            results.append(patcher.model.apply_model(**given, transformer_options=of_node))
        found.append(status())
    torch.save(results, out)
    return found


@contextmanager
def compiled_parts(
    base_model: Any,
    *,
    backend: str | Callable[..., Any] | None = None,
    parts: Sequence[str] = (WHOLE_MODEL,),
    **how: Any,
) -> Iterator[None]:
    """Have compiled modules stand in for parts of a model while this lasts.

    Args:
        backend: None compiles nothing.
        parts: names in the diffusion model.
        how: further arguments of ``torch.compile``.
    """
    keys = [".".join(filter(None, ("diffusion_model", part))) for part in parts]
    before = {key: comfy.utils.get_attr(base_model, key) for key in keys}
    try:
        for key, module in before.items():
            if backend is not None:
                compiled = torch.compile(module, backend=backend, **how)
                comfy.utils.set_attr(base_model, key, compiled)
        yield
    finally:
        for key, module in before.items():
            comfy.utils.set_attr(base_model, key, module)


def step(path: str, out: str, *, backend: str | None, **sizes: Any) -> float:
    """Make one call, and save what it returns; how many seconds it took."""
    patcher = patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    with torch.inference_mode(), compiled_parts(patcher.model, backend=backend):
        given = inputs(patcher.model, **sizes)
        start = time.perf_counter()
        result = patcher.model.apply_model(**given, transformer_options={})
        seconds = time.perf_counter() - start
    torch.save(result, out)
    return seconds


def operators_compiled(path: str, calls: int, **sizes: Any) -> list[int]:
    """Make calls of a compiled model; how many operators of each ran in a graph of this process."""
    counted = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        num_operators = sum(node.op == "call_function" for node in graph.graph.nodes)

        def run(*args: Any) -> Any:
            nonlocal counted
            counted += num_operators
            return graph.forward(*args)

        return run

    found = []
    patcher = patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    parts = compiled_parts(patcher.model, backend=backend)
    with sampling_run(), torch.inference_mode(), parts:
        for _ in range(calls):
            counted = 0
            given = inputs(patcher.model, **sizes)
            patcher.model.apply_model(**given, transformer_options={})
            found.append(counted)
    return found


def forget() -> None:
    """Have the ranks drop their models, as ComfyUI's button for it does."""
    comfy.model_management.unload_all_models()

"""Load API-format graphs, and change values in them (never nodes or links, unless named so).

Runs in: the rig's environment and the tests (standard library only).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from rig.environment import RigError

WORKFLOWS = Path(__file__).parent.parent / "e2e" / "workflows"
SEED_INPUTS = ("seed", "noise_seed")
LATENT_NODES = ("EmptyLatentImage", "EmptySD3LatentImage")
SAMPLER_NODES = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")

Graph = dict[str, dict[str, Any]]


def workflow_names() -> list[str]:
    """Return the names of the rig's own workflows."""
    return sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def workflow_path(name: str) -> Path:
    """Return the file of one of the rig's own workflows."""
    path = WORKFLOWS / f"{name}.json"
    if not path.is_file():
        raise RigError(f"workflow {name!r} is not one of {', '.join(workflow_names())}.")
    return path


def load(source: str | Path) -> Graph:
    """Load a graph by name or from a file in ComfyUI's API format."""
    path = source if isinstance(source, Path) else workflow_path(source)
    try:
        graph = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RigError(f"{path} cannot be read as JSON: {error}") from error
    nodes = graph.values() if isinstance(graph, dict) else [None]
    if not graph or not all(isinstance(n, dict) and "class_type" in n for n in nodes):
        raise RigError(
            f"{path} is not in ComfyUI's API format, in which every node has a class_type. "
            "In ComfyUI's menu choose Workflow > Export (API)."
        )
    result: Graph = graph
    return result


def set_inputs(graph: Graph, **values: Any) -> Graph:
    """Return a copy with these inputs set on every node that has them as a value.

    Inputs that are links stay links. A name that no node has is an error.
    """
    changed = copy.deepcopy(graph)
    for name, value in values.items():
        owners = [
            node["inputs"]
            for node in changed.values()
            if name in node["inputs"] and not isinstance(node["inputs"][name], list)
        ]
        if not owners:
            raise RigError(f"no node of this graph has an input value {name!r}.")
        for inputs in owners:
            inputs[name] = value
    return changed


def with_values(
    graph: Graph,
    *,
    seed: int | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    cfg: float | None = None,
    sampler_name: str | None = None,
    scheduler: str | None = None,
    prompt: str | None = None,
    negative: str | None = None,
    latent_node: str | None = None,
    save_latent: bool = False,
) -> Graph:
    """Return a copy with other values; ``size`` is (width, height) in pixels."""
    values = {
        "steps": steps,
        "batch_size": batch_size,
        "cfg": cfg,
        "sampler_name": sampler_name,
        "scheduler": scheduler,
    }
    if size is not None:
        values |= {"width": size[0], "height": size[1]}
    changed = set_inputs(graph, **{name: v for name, v in values.items() if v is not None})
    if seed is not None:
        changed = with_seed(changed, seed)
    for title, text in (("Positive prompt", prompt), ("Negative prompt", negative)):
        if text is not None:
            _titled(changed, title)["inputs"]["text"] = text
    if latent_node is not None:
        changed = with_latent_node(changed, latent_node)
    return with_saved_latent(changed) if save_latent else changed


def with_seed(graph: Graph, seed: int | None = None) -> Graph:
    """Return a copy with this seed, or with every seed raised by one."""
    changed = copy.deepcopy(graph)
    for node in changed.values():
        for name in SEED_INPUTS:
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = node["inputs"][name] + 1 if seed is None else seed
    return changed


def warm_up(graph: Graph, steps: int) -> Graph:
    """Return a short copy of a graph that shares no cached result with it."""
    changed = with_seed(graph)
    for node in changed.values():
        if isinstance(node["inputs"].get("steps"), int):
            node["inputs"]["steps"] = min(node["inputs"]["steps"], steps)
    return changed


def with_latent_node(graph: Graph, class_type: str) -> Graph:
    """Return a copy whose empty latent has 4 channels (EmptyLatentImage) or 16."""
    if class_type not in LATENT_NODES:
        raise RigError(f"latent node {class_type!r} is not one of {', '.join(LATENT_NODES)}.")
    changed = copy.deepcopy(graph)
    for node in changed.values():
        if node["class_type"] in LATENT_NODES:
            node["class_type"] = class_type
    return changed


def with_saved_latent(graph: Graph) -> Graph:
    """Return a copy with one more node, which saves what the sampler made."""
    changed = copy.deepcopy(graph)
    for number in [key for key, node in graph.items() if node["class_type"] in SAMPLER_NODES]:
        changed[f"{number}-saved"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [number, 0], "filename_prefix": "latents/rig"},
        }
    return changed


def _titled(graph: Graph, title: str) -> dict[str, Any]:
    for node in graph.values():
        if node.get("_meta", {}).get("title") == title:
            return node
    raise RigError(f"no node of this graph has the title {title!r}.")

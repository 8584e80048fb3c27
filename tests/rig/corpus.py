"""The workflow corpus: which templates, their input pictures, and how they are made small.

Runs in: the tests.

Only values are changed, never nodes or links: sizes, steps, nothing else.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rig.graphs import SAMPLER_NODES, Graph
from rig.templates import Workflow

FLUX1 = (
    "flux_schnell",
    "flux_schnell_full_text_to_image",
    "flux_dev_checkpoint_example",
    "flux_dev_full_text_to_image",
    "flux1_krea_dev",
    "flux_fill_inpaint_example",
    "flux_fill_outpaint_example",
    "image_flux.1_fill_dev_OneReward",
    "flux_canny_model_example",
    "flux_redux_model_example",
    "flux1_dev_uso_reference_image_gen",
    "flux_kontext_dev_basic",
    "flux_depth_lora_example",
)
CHROMA = ("image_chroma_text_to_image", "image_chroma1_radiance_text_to_image")
FLUX2 = ("image_flux2", "image_flux2_fp8")
NEWER = (
    "image_flux2_text_to_image",
    "image_flux2_klein_text_to_image",
    "image_flux2_text_to_image_9b",
    "image_flux2_klein_image_edit_4b_base",
    "image_flux2_klein_image_edit_4b_distilled",
    "image_flux2_klein_image_edit_9b_base",
    "image_flux2_klein_image_edit_9b_distilled",
    "image_flux2_klein_9b_kv_image_edit",
    "image_ovis_text_to_image",
    "image_longcat_text_to_image",
    "image_longcat_image_edit",
)
NAMES = {"0.3.75": FLUX1 + CHROMA + FLUX2, "0.33.0": FLUX1 + CHROMA + FLUX2 + NEWER}
# Templates with parts that are switched off ("bypassed") until the user wants them: run once more
# with every part switched on.
ALL_ON = ", all on"
WITH_PARTS_OFF = {
    "0.3.75": ("flux1_dev_uso_reference_image_gen",),
    "0.33.0": (
        "flux1_dev_uso_reference_image_gen",
        "image_flux2_klein_image_edit_4b_distilled",
        "image_flux2_klein_image_edit_9b_base",
    ),
}
# One calls paid services beside FLUX.2, the other upscales with a model that is not of the family.
LEFT_OUT = ("templates-all_in_one-image_edit_models", "utility_pid_latent_upscale_dit")
# What a template must name to belong here: a model file of the family, among its loaders' values.
FAMILY_FILES = re.compile(
    r"(flux|chroma|longcat|ovis)[^/]*\.(safetensors|sft|gguf)$", re.IGNORECASE
)

ALWAYS, BYPASSED = 0, 4  # what the web page writes as "mode" of a node

SIZE = (256, 192)
STEPS = 2
# Sizes that are larger than this are pixels; PrimitiveInt holds pixels and steps alike.
SMALLEST_PIXELS = 256
PAD_PX = 40
SELECTOR_MEGAPIXELS = 0.1  # the least that ResolutionSelector takes
MEGAPIXELS = SIZE[0] * SIZE[1] / 1e6
# FluxKontextImageScale and TextEncodeQwenImageEdit enlarge their image to a million pixels and have
# no value that says otherwise.
LARGE = ("flux_kontext_dev_basic", "image_longcat_image_edit")
HOLE = (64, 48, 176, 128)


def family_templates(workflows: dict[str, Workflow]) -> set[str]:
    """Return the names of all templates that load a model of the FLUX family from a file."""
    return {name for name, workflow in workflows.items() if _names_family(workflow)}


def _names_family(workflow: Workflow) -> bool:
    nodes = list(workflow["nodes"])
    for subgraph in workflow.get("definitions", {}).get("subgraphs", []):
        nodes += subgraph["nodes"]
    return any(
        isinstance(value, str) and FAMILY_FILES.search(value)
        for node in nodes
        if node.get("type") in ("UNETLoader", "CheckpointLoaderSimple")
        for value in node.get("widgets_values") or []
    )


def corpus_workflows(version: str, workflows: dict[str, Workflow]) -> dict[str, Workflow]:
    """Return every workflow of the corpus by its name there."""
    found = {name: workflows[name] for name in NAMES[version]}
    for name in WITH_PARTS_OFF[version]:
        found[name + ALL_ON] = switched_on(workflows[name])
    return found


def graph_names(version: str) -> tuple[str, ...]:
    """Return the names of all graphs of the corpus."""
    return NAMES[version] + tuple(name + ALL_ON for name in WITH_PARTS_OFF[version])


def switched_on(workflow: Workflow) -> Workflow:
    """Return a copy without any bypassed node."""
    changed = copy.deepcopy(workflow)
    subgraphs = changed.get("definitions", {}).get("subgraphs", [])
    for node in [node for part in (changed, *subgraphs) for node in part["nodes"]]:
        if node.get("mode") == BYPASSED:
            node["mode"] = ALWAYS
    return changed


def shrink(name: str, graph: Graph) -> Graph:
    """Return a copy of a template's graph with small sizes and few steps."""
    small = copy.deepcopy(graph)
    steps = 1 if name in LARGE else STEPS
    for node in small.values():
        inputs, kind = node["inputs"], node["class_type"]
        for key, value in inputs.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if key in ("width", "height") and value >= SMALLEST_PIXELS:
                inputs[key] = SIZE[key == "height"]
            elif key == "steps":
                inputs[key] = min(value, steps)
            elif key == "megapixels":
                inputs[key] = SELECTOR_MEGAPIXELS if kind == "ResolutionSelector" else MEGAPIXELS
            elif key == "largest_size":
                inputs[key] = SIZE[0] // 2
            elif kind == "ImagePadForOutpaint" and key in ("left", "top", "right", "bottom"):
                inputs[key] = min(value, PAD_PX)
            elif kind == "PrimitiveInt":
                inputs[key] = SIZE[0] if value >= SMALLEST_PIXELS else min(value, steps)
    return small


def write_pictures(graph: Graph, folder: Path) -> None:
    """Write a picture for every LoadImage node of a graph; PNG files have a hole as mask."""
    for node in graph.values():
        if node["class_type"] != "LoadImage":
            continue
        path = folder / node["inputs"]["image"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = _picture(seed=sum(path.name.encode()))
            if path.suffix == ".png":
                alpha = Image.new("L", picture.size, 255)
                alpha.paste(0, HOLE)
                picture.putalpha(alpha)
            picture.save(path)


def _picture(seed: int) -> Image.Image:
    """Make coarse patches of colour with some edges in them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
    smooth.paste(Image.fromarray(coarse).resize((96, 72), Image.Resampling.NEAREST), (20, 90))
    return smooth


def sampled_outputs(graph: Graph) -> set[str]:
    """Return the ids of nodes to which something flows from a sampler."""

    def is_sampled(node_id: str) -> bool:
        node: dict[str, Any] = graph[node_id]
        if node["class_type"] in SAMPLER_NODES:
            return True
        links = [v for v in node["inputs"].values() if isinstance(v, list) and len(v) == 2]
        return any(is_sampled(str(source)) for source, _ in links)

    return {node_id for node_id in graph if is_sampled(node_id)}

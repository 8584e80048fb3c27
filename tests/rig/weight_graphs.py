"""Change where a graph's model comes from: other files and loaders, LoRAs, merges, control.

Runs in: the rig's environment and the tests (standard library only).

Every function returns a copy. Graphs are the rig's own, in which node "1" loads the model.
"""

from __future__ import annotations

import copy
from typing import Any

from rig.graphs import Graph

LOADER = "1"
SAMPLER, DECODER = "8", "9"
CHECKPOINT_OUTPUTS = {"2": 1, "3": 2}  # nodes that a checkpoint replaces, and its output


def with_unet(graph: Graph, name: str, weight_dtype: str = "default") -> Graph:
    """Load the diffusion model from another file."""
    return with_loader(graph, "UNETLoader", unet_name=name, weight_dtype=weight_dtype)


def with_gguf(graph: Graph, name: str) -> Graph:
    """Load the diffusion model from a GGUF file."""
    return with_loader(graph, "UnetLoaderGGUF", unet_name=name)


def with_loader(graph: Graph, class_type: str, **inputs: Any) -> Graph:
    """Load the diffusion model with another node."""
    changed = copy.deepcopy(graph)
    changed[LOADER] = {"class_type": class_type, "inputs": inputs}
    return changed


def with_checkpoint(graph: Graph, name: str) -> Graph:
    """Load diffusion model, text encoders and VAE from one file."""
    changed = with_loader(graph, "CheckpointLoaderSimple", ckpt_name=name)
    for node in changed.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in CHECKPOINT_OUTPUTS:
                node["inputs"][key] = [LOADER, CHECKPOINT_OUTPUTS[value[0]]]
    for number in CHECKPOINT_OUTPUTS:
        del changed[number]
    return changed


def with_loras(graph: Graph, *loras: tuple[str, float]) -> Graph:
    """Chain LoRAs, each a file name and a strength, between the model and those who use it."""
    changed = graph
    for number, (name, strength) in enumerate(loras):
        inputs = {"lora_name": name, "strength_model": strength}
        changed = _insert(changed, f"lora-{number}", "LoraLoaderModelOnly", "model", inputs)
    return changed


def with_compute_dtype(graph: Graph, name: str) -> Graph:
    """Have the model compute in another dtype: ``fp32``, ``bf16``, ``fp16``."""
    return _insert(graph, "compute", "ModelComputeDtype", "model", {"dtype": name})


def with_hooked_lora(
    graph: Graph, name: str, *, on: tuple[str, ...], strength: float = 1.0
) -> Graph:
    """Have ComfyUI's hooks lay a LoRA over the weights for these prompts of the sampler."""
    changed = copy.deepcopy(graph)
    if not on:
        return changed
    hook = {"lora_name": name, "strength_model": strength}
    changed["hook"] = {"class_type": "CreateHookLoraModelOnly", "inputs": hook}
    sampler = changed[SAMPLER]["inputs"]
    for prompt in on:
        changed[f"hooked-{prompt}"] = {
            "class_type": "ConditioningSetProperties",
            "inputs": {
                "cond_NEW": sampler[prompt],
                "hooks": ["hook", 0],
                "strength": 1.0,
                "set_cond_area": "default",
            },
        }
        sampler[prompt] = [f"hooked-{prompt}", 0]
    return changed


def with_merge(graph: Graph, name: str, ratio: float) -> Graph:
    """Merge the model with that of another file; ``ratio`` is the share of the first."""
    inputs = {"model2": ["merge-other", 0], "ratio": ratio}
    changed = _insert(graph, "merge", "ModelMergeSimple", "model1", inputs)
    other = {"unet_name": name, "weight_dtype": "default"}
    changed["merge-other"] = {"class_type": "UNETLoader", "inputs": other}
    return changed


def with_control(graph: Graph, width: int, height: int) -> Graph:
    """Steer by a picture: its latent is concatenated to the noise, as FLUX.1 Canny and Depth do."""
    changed = copy.deepcopy(graph)
    blank = {"width": width // 2, "height": height // 2, "batch_size": 1, "color": 0x3060C0}
    changed["blank"] = {"class_type": "EmptyImage", "inputs": blank}
    # Padding puts a soft grey frame around it: a picture with edges, without a file.
    frame = dict.fromkeys(("left", "right"), width // 4)
    frame |= dict.fromkeys(("top", "bottom"), height // 4)
    changed["framed"] = {
        "class_type": "ImagePadForOutpaint",
        "inputs": {"image": ["blank", 0], "feathering": 16, **frame},
    }
    sampler = changed[SAMPLER]["inputs"]
    changed["control"] = {
        "class_type": "InstructPixToPixConditioning",
        "inputs": {
            "positive": sampler["positive"],
            "negative": sampler["negative"],
            "vae": changed[DECODER]["inputs"]["vae"],
            "pixels": ["framed", 0],
        },
    }
    sampler["positive"], sampler["negative"] = ["control", 0], ["control", 1]
    return changed


def _insert(
    graph: Graph, number: str, class_type: str, model_input: str, inputs: dict[str, Any]
) -> Graph:
    """Put a node between the sampler and whatever gives it its model."""
    changed = copy.deepcopy(graph)
    sampler = changed[SAMPLER]["inputs"]
    inputs = {**inputs, model_input: sampler["model"]}
    changed[number] = {"class_type": class_type, "inputs": inputs}
    sampler["model"] = [number, 0]
    return changed

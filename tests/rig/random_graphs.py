"""Draw a graph from everything that runs in parallel; the same seed draws the same graph.

Runs in: the tests (standard library only).

Only what the feature rows hold one by one is combined here, so that a failure is one of the
combination. A drawing that stock ComfyUI refuses would be a fault of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rig.feature_controls import (
    INPAINT,
    INSTANTX,
    INSTANTX_UNION,
    MISTOLINE,
    UNION_PRO,
    UNION_PRO_2,
    XLABS,
)
from rig.feature_family import style
from rig.feature_graphs import OTHER_PICTURE, PICTURE, Draft
from rig.feature_prompts import combined
from rig.graphs import Graph
from rig.random_choices import Choices

SIDES = (64, 80, 88, 96, 104, 112, 120, 128, 136, 144, 168)
REFERENCE_SIDES = (32, 48, 56, 64, 72, 88, 104)
SAMPLERS = ("euler", "euler", "heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "dpm_2", "ddim")
SCHEDULERS = ("simple", "beta", "normal", "sgm_uniform", "linear_quadratic")
LATENT_HINTS = (INSTANTX, INSTANTX_UNION, UNION_PRO, UNION_PRO_2, INPAINT)
# ComfyUI does not pad what they make of the picture: they take whole tokens of 16 px only.
PICTURE_HINTS = (XLABS, MISTOLINE)
UNIONS = (INSTANTX_UNION, UNION_PRO)
KINDS = ("auto", "openpose", "depth", "tile", "normal")
METHODS = (None, "offset", "index", "uxo/uno")
MODELS = ("flux1-dev.safetensors",) * 4 + ("flux1-schnell.safetensors",)
LORAS = ("kohya.safetensors", "diffusers.safetensors")
PICTURES = (PICTURE, OTHER_PICTURE)


@dataclass(frozen=True)
class Drawn:
    """A graph, and what is in it."""

    seed: int
    graph: Graph
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"seed {self.seed}: {', '.join(self.parts)}"


def draw(seed: int) -> Drawn:
    """Draw a graph that every ComfyUI knows."""
    choose = Choices(seed)
    size = (choose.one(SIDES), choose.one(SIDES))
    draft = Draft(size, steps=choose.one((1, 2, 2, 3)))
    parts = [f"{size[0]} x {size[1]}", f"{draft.sampler['steps']} steps"]
    for part in (
        _model,
        _prompts,
        _sampler,
        _latent,
        _areas,
        _style,
        _controls,
        _references,
        _second_sampler,
    ):
        parts += part(choose, draft)
    return Drawn(seed, draft.finished(), tuple(parts))


def _model(choose: Choices, draft: Draft) -> list[str]:
    parts = [choose.one(MODELS).removesuffix(".safetensors")]
    draft.nodes["1"]["inputs"]["unet_name"] = f"{parts[0]}.safetensors"
    for _ in range(choose.one((0, 0, 0, 1, 1, 2))):
        name, strength = choose.one(LORAS), choose.number(-0.8, 1.0)
        draft.lora(name, strength)
        parts.append(f"LoRA {name.removesuffix('.safetensors')} {strength}")
    if choose.chance(0.15):
        scale = {"scale_x": choose.number(0.6, 1.5), "scale_y": choose.number(0.6, 1.5)}
        draft.model("ScaleROPE", **scale, scale_t=1.0, shift_x=1.0, shift_y=0.0, shift_t=0.0)
        parts.append("ScaleROPE")
    if choose.chance(0.15):
        shift = {"max_shift": choose.number(0.8, 1.6), "base_shift": 0.5}
        draft.model("ModelSamplingFlux", **shift, width=128, height=128)
        parts.append("ModelSamplingFlux")
    return parts


def _prompts(choose: Choices, draft: Draft) -> list[str]:
    number = choose.one((1, 5, 12, 40, 260, 300))
    draft.nodes["4"]["inputs"]["text"] = choose.words(number)
    draft.nodes["6"]["inputs"]["guidance"] = choose.number(1.0, 6.0)
    parts = [f"prompt of {number} words"]
    if choose.chance(0.4):
        draft.nodes["5"]["inputs"]["text"] = choose.words(choose.one((1, 10, 280)))
        draft.set(cfg=choose.number(1.2, 3.5))
        parts.append(f"cfg {draft.sampler['cfg']}")
    if choose.chance(0.1):
        draft.positive("FluxDisableGuidance")
        parts.append("FluxDisableGuidance")
    return parts


def _sampler(choose: Choices, draft: Draft) -> list[str]:
    name, scheduler = choose.one(SAMPLERS), choose.one(SCHEDULERS)
    draft.set(seed=choose.whole(0, 2**32), sampler_name=name, scheduler=scheduler)
    return [f"{name}/{scheduler}"]


def _latent(choose: Choices, draft: Draft) -> list[str]:
    size = tuple(draft.nodes["7"]["inputs"][name] for name in ("width", "height"))
    number = choose.one((1, 1, 1, 2, 3))
    kind = choose.one(("empty", "empty", "empty", "picture", "noise mask", "inpaint"))
    if kind == "empty":
        draft.nodes["7"]["inputs"]["batch_size"] = number
        return [f"batch of {number}"]
    name = choose.one(PICTURES)
    # The VAE drops what does not fill its 8 px.
    draft.set(latent_image=draft.encoded(name, size), denoise=choose.number(0.4, 1.0))
    if kind == "noise mask":
        draft.latent("SetLatentNoiseMask", mask=draft.mask())
        if choose.chance(0.4):
            draft.model("DifferentialDiffusion")
            kind = "DifferentialDiffusion"
    elif kind == "inpaint":
        values = {key: draft.sampler[key] for key in ("positive", "negative")}
        inputs = {**values, "vae": ["3", 0], "pixels": draft.picture(name, size)}
        made = draft.add("InpaintModelConditioning", **inputs, mask=draft.mask(), noise_mask=True)
        draft.set(positive=made, negative=[made[0], 1], latent_image=[made[0], 2])
    if number > 1:
        draft.latent("RepeatLatentBatch", amount=number)
    return [f"{kind}, denoise {draft.sampler['denoise']}, batch of {number}"]


def _areas(choose: Choices, draft: Draft) -> list[str]:
    parts = []
    for _ in range(choose.one((0, 0, 0, 1, 2))):
        kind, prompt = (
            choose.one(("area", "mask", "mask bounds", "whole", "range")),
            choose.words(6),
        )
        other = draft.prompt(prompt)
        strength = choose.number(0.4, 1.2)
        if kind == "area":
            box = {"width": 0.5, "height": choose.number(0.3, 0.7), "x": 0.25, "y": 0.2}
            node = "ConditioningSetAreaPercentage"
            other = draft.add(node, conditioning=other, **box, strength=strength)
        elif kind == "range":
            node = "ConditioningSetTimestepRange"
            other = draft.add(node, conditioning=other, start=0.0, end=choose.number(0.3, 0.8))
        elif kind != "whole":
            bounds = {"set_cond_area": kind if kind != "mask" else "default"}
            inputs = {"mask": draft.mask(), "strength": strength, **bounds}
            other = draft.add("ConditioningSetMask", conditioning=other, **inputs)
        combined(draft, other)
        parts.append(f"second prompt ({kind})")
    return parts


def _style(choose: Choices, draft: Draft) -> list[str]:
    if not choose.chance(0.2):
        return []
    kind = choose.one(("multiply", "attn_bias"))
    style(draft, kind, choose.number(0.3, 0.9))
    return [f"Redux {kind}"]


def _controls(choose: Choices, draft: Draft) -> list[str]:
    parts = []
    files = (*LATENT_HINTS, *PICTURE_HINTS) if _has_whole_tokens(draft) else LATENT_HINTS
    for _ in range(choose.one((0, 0, 0, 1, 1, 2))):
        file = choose.one(files)
        values: dict[str, Any] = {"strength": choose.number(0.2, 1.2)}
        values |= {"picture": choose.one(PICTURES), "inpaint": file == INPAINT}
        if file in UNIONS:
            values["kind"] = choose.one(KINDS)
        if choose.chance(0.3):
            values |= {"start": choose.number(0.0, 0.4), "end": choose.number(0.5, 1.0)}
        draft.control(file, **values)
        parts.append(file.removesuffix(".safetensors") + (" part" if "start" in values else ""))
    return parts


def _has_whole_tokens(draft: Draft) -> bool:
    """Whether no part of the picture ends in the middle of a token."""
    sides = [draft.nodes["7"]["inputs"][name] for name in ("width", "height")]
    parts = [
        node
        for node in draft.nodes.values()
        if node["class_type"] == "ConditioningSetAreaPercentage"
        or node["inputs"].get("set_cond_area") == "mask bounds"
    ]
    return not parts and all(side % 16 == 0 for side in sides)


def _references(choose: Choices, draft: Draft) -> list[str]:
    sizes = [
        (choose.one(REFERENCE_SIDES), choose.one(REFERENCE_SIDES))
        for _ in range(choose.one((0, 0, 0, 1, 1, 2, 3)))
    ]
    for size in sizes:
        draft.reference(size, choose.one(PICTURES))
    if not sizes:
        return []
    method = choose.one(METHODS)
    if method is not None:
        node = "FluxKontextMultiReferenceLatentMethod"
        draft.positive(node, reference_latents_method=method)
    return [f"references {sizes} {method or ''}".strip()]


def _second_sampler(choose: Choices, draft: Draft) -> list[str]:
    if not choose.chance(0.15):
        return []
    latent = ["8", 0]
    if choose.chance(0.5):
        sides = {name: draft.nodes["7"]["inputs"][name] + 32 for name in ("width", "height")}
        inputs = {"samples": latent, "upscale_method": "bilinear", "crop": "disabled"}
        latent = draft.add("LatentUpscale", **inputs, **sides)
    draft.again(latent, denoise=0.5, sampler_name="euler")
    return ["second sampler" + (", larger" if latent[0] != "8" else "")]

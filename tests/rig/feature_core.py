"""Rows: what graphs do with ComfyUI's own nodes, beside ControlNets and ways to load weights.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from typing import Any

from rig.feature_graphs import OTHER_PICTURE, SEED, VAE, Draft, Link
from rig.feature_rows import FALLS_BACK, Row, plain

SMALL_REFERENCES = ((112, 144), (80, 80), (96, 64))
REFERENCE_METHODS = ("offset", "index", "uxo/uno", "index_timestep_zero")
TIMESTEP_ZERO = ("comfy_extras/nodes_flux.py", "index_timestep_zero")
SAME_UNREAD = "FLUX does not read what the node sets"


def extra(name: str) -> tuple[str, str]:
    """Return where a version of ComfyUI shows that it has a node of its ``comfy_extras``."""
    files = {
        "DualModelGuider": "nodes_custom_sampler.py",
        "NAGuidance": "nodes_nag.py",
        "FluxKVCache": "nodes_flux.py",
        "ModelAttentionBackend": "nodes_model_advanced.py",
        "LoraLoaderBypassModelOnly": "nodes_lora_debug.py",
    }
    return f"comfy_extras/{files[name]}", f"class {name}"


def combined(draft: Draft, other: Link) -> None:
    """Combine a second prompt with the first."""
    both = {"conditioning_1": draft.sampler["positive"], "conditioning_2": other}
    draft.set(positive=draft.add("ConditioningCombine", **both))


def area(draft: Draft) -> None:
    inputs = {"width": 64, "height": 96, "x": 32, "y": 16, "strength": 1.0}
    combined(draft, draft.add("ConditioningSetArea", conditioning=draft.prompt(), **inputs))


def area_of_odd_size(draft: Draft) -> None:
    inputs = {"width": 56, "height": 72, "x": 24, "y": 8, "strength": 0.7}
    combined(draft, draft.add("ConditioningSetArea", conditioning=draft.prompt(), **inputs))


def area_percentage(draft: Draft) -> None:
    inputs = {"width": 0.5, "height": 0.4, "x": 0.3, "y": 0.6, "strength": 0.8}
    node = "ConditioningSetAreaPercentage"
    combined(draft, draft.add(node, conditioning=draft.prompt(), **inputs))


def masked_prompt(draft: Draft, set_cond_area: str = "default") -> None:
    inputs = {"mask": draft.mask(), "strength": 1.0, "set_cond_area": set_cond_area}
    combined(draft, draft.add("ConditioningSetMask", conditioning=draft.prompt(), **inputs))


def timestep_range(draft: Draft) -> None:
    node = "ConditioningSetTimestepRange"
    draft.positive(node, start=0.0, end=0.5)
    combined(draft, draft.add(node, conditioning=draft.prompt(), start=0.5, end=1.0))


def concatenated(draft: Draft) -> None:
    both = {"conditioning_to": draft.sampler["positive"], "conditioning_from": draft.prompt()}
    draft.set(positive=draft.add("ConditioningConcat", **both))


def averaged(draft: Draft) -> None:
    both = {"conditioning_to": draft.sampler["positive"], "conditioning_from": draft.prompt()}
    node = "ConditioningAverage"
    draft.set(positive=draft.add(node, **both, conditioning_to_strength=0.4))


def long_prompt(draft: Draft) -> None:
    draft.nodes["4"]["inputs"]["text"] = ", ".join(["waves and gulls and salt"] * 80)


def noise_mask(draft: Draft) -> None:
    draft.set(latent_image=draft.encoded())
    draft.latent("SetLatentNoiseMask", mask=draft.mask())


def differential(draft: Draft) -> None:
    noise_mask(draft)
    draft.model("DifferentialDiffusion")


def encoded_for_inpaint(draft: Draft) -> None:
    inputs = {"pixels": draft.picture(), "vae": VAE, "mask": draft.mask(), "grow_mask_by": 6}
    draft.set(latent_image=draft.add("VAEEncodeForInpaint", **inputs))


def inpaint_conditioning(draft: Draft) -> None:
    values = {name: draft.sampler[name] for name in ("positive", "negative")}
    inputs = {**values, "vae": VAE, "pixels": draft.picture(), "mask": draft.mask()}
    made = draft.add("InpaintModelConditioning", **inputs, noise_mask=True)
    draft.set(positive=made, negative=[made[0], 1], latent_image=[made[0], 2])


def image_to_image(draft: Draft) -> None:
    draft.set(latent_image=draft.encoded(OTHER_PICTURE), denoise=0.6)


def hires_fix(draft: Draft) -> None:
    inputs = {"samples": ["8", 0], "upscale_method": "bislerp", "scale_by": 1.5}
    draft.again(draft.add("LatentUpscaleBy", **inputs), denoise=0.6)


def two_samplers(draft: Draft) -> None:
    draft.again(["8", 0], denoise=0.5, seed=SEED + 1, sampler_name="heun", cfg=2.0)


def tiled_decoding(draft: Draft) -> None:
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    draft.nodes["9"]["class_type"] = "VAEDecodeTiled"
    draft.nodes["9"]["inputs"] |= tiles


def tiled_encoding(draft: Draft) -> None:
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    encoded = draft.add("VAEEncodeTiled", pixels=draft.picture(), vae=VAE, **tiles)
    draft.set(latent_image=encoded, denoise=0.6)


def batch(draft: Draft) -> None:
    draft.nodes["7"]["inputs"]["batch_size"] = 3


def repeated_batch(draft: Draft) -> None:
    draft.set(latent_image=draft.encoded(), denoise=0.7)
    draft.latent("RepeatLatentBatch", amount=2)


def one_seed_for_the_batch(draft: Draft) -> None:
    repeated_batch(draft)
    draft.latent("LatentBatchSeedBehavior", seed_behavior="fixed")


def part_of_a_batch(draft: Draft) -> None:
    batch(draft)
    draft.latent("LatentFromBatch", batch_index=2, length=1)


def batch_of_two_pictures(draft: Draft) -> None:
    both = {"samples1": draft.encoded(), "samples2": draft.encoded(OTHER_PICTURE)}
    draft.set(latent_image=draft.add("LatentBatch", **both), denoise=0.7, cfg=2.0)


def leftover_noise(draft: Draft) -> None:
    draft.advanced(steps=4, end_at_step=2, return_with_leftover_noise="enable")
    rest = {"steps": 4, "start_at_step": 2, "end_at_step": 10000, "add_noise": "disable"}
    draft.again(["8", 0], "KSamplerAdvanced", **rest, return_with_leftover_noise="disable")


def split_sigmas(draft: Draft) -> None:
    draft.guided_by("BasicGuider", steps=4, conditioning=draft.sampler["positive"])
    split = draft.add("SplitSigmas", sigmas=draft.sampler["sigmas"], step=2)
    draft.set(sigmas=split)
    rest = {"sigmas": [split[0], 1], "noise": draft.add("DisableNoise")}
    draft.again(["8", 0], "SamplerCustomAdvanced", **rest)


def cfg_guider(draft: Draft) -> None:
    values = {name: draft.sampler[name] for name in ("positive", "negative")}
    draft.guided_by("CFGGuider", **values, cfg=3.0)


def dual_cfg(style: str) -> Row:
    def change(draft: Draft) -> None:
        conds = {"cond1": draft.sampler["positive"], "cond2": draft.prompt()}
        conds["negative"] = draft.sampler["negative"]
        scales = {"cfg_conds": 2.5, "cfg_cond2_negative": 1.5}
        draft.guided_by("DualCFGGuider", **conds, **scales, style=style)

    return Row(change)


def dual_model(draft: Draft) -> None:
    other = {"unet_name": "flux1-schnell.safetensors", "weight_dtype": "default"}
    prompts = {name: draft.sampler[name] for name in ("positive", "negative")}
    second = draft.add("UNETLoader", **other)
    draft.guided_by("DualModelGuider", **prompts, cfg=2.5, model_negative=second)


def perpendicular_negative(draft: Draft) -> None:
    prompts = {name: draft.sampler[name] for name in ("positive", "negative")}
    empty = draft.prompt("")
    draft.guided_by("PerpNegGuider", **prompts, empty_conditioning=empty, cfg=3.0, neg_scale=1.0)


def skip_layers(draft: Draft) -> None:
    values = {"scale": 2.0, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.2}
    draft.model("SkipLayerGuidanceDiT", double_layers="1", single_layers="0", **values)
    draft.set(cfg=2.0)


def skip_layers_simple(draft: Draft) -> None:
    values = {"start_percent": 0.0, "end_percent": 1.0}
    draft.model("SkipLayerGuidanceDiTSimple", double_layers="1", single_layers="0", **values)
    draft.set(cfg=2.5)


def cache(node: str) -> Row:
    def change(draft: Draft) -> None:
        values = {"reuse_threshold": 2.0, "start_percent": 0.1, "end_percent": 0.95}
        draft.model(node, **values, verbose=False)

    return Row(change, steps=6)


def windows(dim: int, length: int, overlap: int, schedule: str) -> Row:
    def change(draft: Draft) -> None:
        values = {"context_length": length, "context_overlap": overlap, "dim": dim}
        values |= {"context_stride": 1, "closed_loop": False}
        names = {"context_schedule": schedule, "fuse_method": "pyramid"}
        draft.model("ContextWindowsManual", **values, **names)
        if dim == 0:
            draft.nodes["7"]["inputs"]["batch_size"] = 4

    return Row(change)


def rope_scale(draft: Draft) -> None:
    scale = {"scale_x": 1.4, "scale_y": 0.8, "scale_t": 1.0}
    draft.model("ScaleROPE", **scale, shift_x=3.0, shift_y=0.0, shift_t=1.0)


def rope_scale_with_reference(draft: Draft) -> None:
    rope_scale(draft)
    draft.reference((112, 144))


def patched(node: str, cfg: float | None = None, **inputs: Any) -> Row:
    """A node between model and sampler; with ``cfg`` also a negative prompt."""

    def change(draft: Draft) -> None:
        draft.model(node, **inputs)
        if cfg is not None:
            draft.set(cfg=cfg)

    return Row(change)


def unread(node: str, reason: str = "", **inputs: Any) -> Row:
    """A node made for other models, which FLUX does not notice."""
    return Row(lambda draft: draft.model(node, **inputs), same_as_plain=SAME_UNREAD, reason=reason)


def negative_attention(draft: Draft) -> None:
    draft.model("NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)


def kv_cache(draft: Draft) -> None:
    draft.reference((112, 144))
    draft.model("FluxKVCache")


def kv_cache_of_two(draft: Draft) -> None:
    draft.reference((112, 144))
    draft.reference((80, 80), OTHER_PICTURE)
    draft.model("FluxKVCache")
    draft.set(cfg=2.0)


def references(number: int, method: str | None = None) -> Row:
    def change(draft: Draft) -> None:
        for index, size in enumerate(SMALL_REFERENCES[:number]):
            draft.reference(size, OTHER_PICTURE if index % 2 else "rig-picture.png")
        if method is not None:
            node = "FluxKontextMultiReferenceLatentMethod"
            draft.positive(node, reference_latents_method=method)

    needs = TIMESTEP_ZERO if method == "index_timestep_zero" else None
    return Row(change, needs=needs)


def style(draft: Draft, strength_type: str, strength: float) -> None:
    made = draft.add("SmallStyle")
    inputs = {"style_model": made, "clip_vision_output": [made[0], 1]}
    draft.positive("StyleModelApply", **inputs, strength=strength, strength_type=strength_type)


def redux(strength_type: str, strength: float) -> Row:
    return Row(lambda draft: style(draft, strength_type, strength))


def two_styles(draft: Draft) -> None:
    style(draft, "attn_bias", 0.5)
    style(draft, "attn_bias", 1.0)
    draft.set(cfg=2.0)


def style_projector(draft: Draft) -> None:
    made = draft.add("SmallStyleProjector")
    draft.model("USOStyleReference", model_patch=made, clip_vision_output=[made[0], 1])
    draft.reference((112, 144), method="uxo/uno")


def hook_lora(draft: Draft) -> None:
    lora = {"lora_name": "kohya.safetensors", "strength_model": 1.0, "strength_clip": 0.0}
    hooks = draft.add("CreateHookLora", **lora)
    values = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    made = draft.add("ConditioningSetProperties", cond_NEW=draft.sampler["positive"], **values)
    draft.set(positive=made)


def bypass_lora(draft: Draft) -> None:
    values = {"lora_name": "kohya.safetensors", "strength_model": 1.0}
    draft.model("LoraLoaderBypassModelOnly", **values)


def compiled(draft: Draft) -> None:
    draft.model("TorchCompileModel", backend="inductor")


def sampler(name: str, scheduler: str = "simple", **inputs: Any) -> Row:
    def change(draft: Draft) -> None:
        draft.set(sampler_name=name, scheduler=scheduler, **inputs)

    return Row(change, steps=3)


ROWS: dict[str, Row] = {
    "plain": Row(plain, same_as_plain="it is the plain one"),
    "negative prompt, cfg 3": Row(lambda draft: draft.set(cfg=3.0)),
    "long prompt": Row(long_prompt),
    "ConditioningSetArea": Row(area),
    "ConditioningSetArea, odd size": Row(area_of_odd_size),
    "ConditioningSetAreaPercentage": Row(area_percentage),
    "ConditioningSetMask": Row(masked_prompt),
    "ConditioningSetMask, mask bounds": Row(lambda d: masked_prompt(d, "mask bounds")),
    "ConditioningCombine": Row(lambda draft: combined(draft, draft.prompt())),
    "ConditioningSetTimestepRange": Row(timestep_range, steps=4),
    "ConditioningConcat": Row(concatenated),
    "ConditioningAverage": Row(averaged),
    "inpaint noise mask (SetLatentNoiseMask)": Row(noise_mask),
    "VAEEncodeForInpaint": Row(encoded_for_inpaint),
    "InpaintModelConditioning": Row(inpaint_conditioning),
    "DifferentialDiffusion": Row(differential),
    "image to image, denoise 0.6": Row(image_to_image),
    "hires fix (latent upscale, second KSampler)": Row(hires_fix),
    "two samplers, one after the other": Row(two_samplers),
    "VAEDecodeTiled": Row(tiled_decoding, same_as_plain="tiles differ at their seams only"),
    "VAEEncodeTiled": Row(tiled_encoding),
    "batch of 3": Row(batch),
    "RepeatLatentBatch": Row(repeated_batch),
    "LatentBatchSeedBehavior": Row(one_seed_for_the_batch),
    "LatentFromBatch": Row(part_of_a_batch),
    "batch of two pictures, cfg 2": Row(batch_of_two_pictures),
    "200 x 136 px": Row(plain, size=(200, 136), same_as_plain="it is the plain one"),
    "KSamplerAdvanced, leftover noise": Row(leftover_noise),
    "SplitSigmas, two SamplerCustomAdvanced": Row(split_sigmas),
    "CFGGuider": Row(cfg_guider),
    "DualCFGGuider": dual_cfg("regular"),
    "DualCFGGuider, nested": dual_cfg("nested"),
    "DualModelGuider": Row(dual_model, needs=extra("DualModelGuider")),
    "PerpNegGuider": Row(perpendicular_negative),
    "SkipLayerGuidanceDiT": Row(skip_layers),
    "SkipLayerGuidanceDiTSimple": Row(skip_layers_simple),
    "EasyCache": cache("EasyCache"),
    "LazyCache": cache("LazyCache"),
    "ContextWindowsManual, over a batch": windows(0, 2, 1, "standard_static"),
    "ContextWindowsManual, over the height": windows(2, 10, 4, "standard_uniform"),
    "ScaleROPE": Row(rope_scale),
    "ScaleROPE, reference latent": Row(rope_scale_with_reference),
    "TorchCompileModel": Row(compiled, same_as_plain="only speed differs"),
    "ModelSamplingFlux": patched(
        "ModelSamplingFlux", max_shift=2.0, base_shift=0.9, width=128, height=128
    ),
    "RescaleCFG": patched("RescaleCFG", 4.0, multiplier=0.7),
    "CFGZeroStar": patched("CFGZeroStar", 3.0),
    "CFGNorm": patched("CFGNorm", 3.0, strength=0.8),
    "APG": patched("APG", 3.0, eta=0.5, norm_threshold=5.0, momentum=0.1),
    "TCFG": patched("TCFG", 3.0),
    "Mahiro": patched("Mahiro", 3.0),
    "FreSca": patched("FreSca", 3.0, scale_low=1.0, scale_high=1.25, freq_cutoff=5),
    "NAGuidance": Row(negative_attention, needs=extra("NAGuidance")),
    "FluxKVCache": Row(kv_cache, needs=extra("FluxKVCache"), steps=3),
    "FluxKVCache, two references, cfg 2": Row(kv_cache_of_two, needs=extra("FluxKVCache"), steps=3),
    "ModelAttentionBackend": Row(
        lambda draft: draft.model("ModelAttentionBackend", attention="pytorch attention"),
        needs=extra("ModelAttentionBackend"),
        same_as_plain="the tests use that attention anyway",
    ),
    "FluxDisableGuidance": Row(lambda draft: draft.positive("FluxDisableGuidance")),
    "Redux": redux("multiply", 1.0),
    "Redux, attention mask": redux("attn_bias", 0.4),
    "Redux twice, attention mask, cfg 2": Row(two_styles),
    "USO style reference": Row(style_projector),
    "reference latent": references(1),
    "two reference latents": references(2),
    "three reference latents": references(3),
    **{f"three reference latents, {m}": references(3, m) for m in REFERENCE_METHODS},
    "LoRA scheduled by hooks": Row(hook_lora, FALLS_BACK, "hook"),
    "LoraLoaderBypass": Row(
        bypass_lora, FALLS_BACK, "injected", needs=extra("LoraLoaderBypassModelOnly")
    ),
    "ModelComputeDtype": unread("ModelComputeDtype", dtype="bf16"),
    "FreeU": unread("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "PerturbedAttentionGuidance": unread("PerturbedAttentionGuidance", scale=3.0),
    "sampler heun, cfg 2": sampler("heun", cfg=2.0),
    "sampler dpmpp_2m, scheduler beta": sampler("dpmpp_2m", "beta"),
    "sampler euler_ancestral": sampler("euler_ancestral"),
    "sampler uni_pc": sampler("uni_pc"),
    "sampler euler_cfg_pp, cfg 1": sampler("euler_cfg_pp"),
}

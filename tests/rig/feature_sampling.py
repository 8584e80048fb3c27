"""Rows: samplers, guiders, and ComfyUI's own nodes between model and sampler.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from typing import Any

from rig.feature_graphs import SEED, Draft
from rig.feature_rows import REFUSED, Row
from rig.trees import Need

SAME_UNREAD = "FLUX does not read what the node sets"


def extra(name: str) -> Need:
    """Return where a version of ComfyUI shows that it has a node of its ``comfy_extras``."""
    files = {
        "DualModelGuider": "nodes_custom_sampler.py",
        "NAGuidance": "nodes_nag.py",
        "FluxKVCache": "nodes_flux.py",
        "ModelAttentionBackend": "nodes_model_advanced.py",
    }
    return f"comfy_extras/{files[name]}", f"class {name}"


def hires_fix(draft: Draft) -> None:
    inputs = {"samples": ["8", 0], "upscale_method": "bislerp", "scale_by": 1.5}
    draft.again(draft.add("LatentUpscaleBy", **inputs), denoise=0.6)


def two_samplers(draft: Draft) -> None:
    draft.again(["8", 0], denoise=0.5, seed=SEED + 1, sampler_name="heun", cfg=2.0)


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


def windows(
    dim: int,
    length: int,
    overlap: int,
    schedule: str,
    needs: Need | None = None,
    why: str = "",
) -> Row:
    def change(draft: Draft) -> None:
        values = {"context_length": length, "context_overlap": overlap, "dim": dim}
        values |= {"context_stride": 1, "closed_loop": False}
        names = {"context_schedule": schedule, "fuse_method": "pyramid"}
        # What 0.33.0 asks for besides; 0.3.75 does not look at it.
        values |= {"freenoise": False, "split_conds_to_windows": False, "causal_window_fix": True}
        names |= {"cond_retain_index_list": "", "latent_retain_index_list": ""}
        draft.model("ContextWindowsManual", **values, **names)
        if dim == 0:
            draft.nodes["7"]["inputs"]["batch_size"] = 4

    return Row(change, needs=needs, why=why)


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


def negative_attention(draft: Draft) -> None:
    draft.model("NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)


def compiled(draft: Draft) -> None:
    draft.model("TorchCompileModel", backend="inductor")


def sampler(name: str, scheduler: str = "simple", **inputs: Any) -> Row:
    def change(draft: Draft) -> None:
        draft.set(sampler_name=name, scheduler=scheduler, **inputs)

    return Row(change, steps=3)


ROWS: dict[str, Row] = {
    "hires fix (latent upscale, second KSampler)": Row(hires_fix),
    "two samplers, one after the other": Row(two_samplers),
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
    "ContextWindowsManual, over a batch": windows(
        0,
        2,
        1,
        "standard_static",
        needs=("comfy_extras/nodes_context_windows.py", "freenoise"),
        why="the node of 0.3.75 fails on a batch",
    ),
    "ContextWindowsManual, over the height": windows(2, 10, 4, "standard_uniform"),
    "ScaleROPE": Row(rope_scale),
    "ScaleROPE, reference latent": Row(rope_scale_with_reference),
    "TorchCompileModel": Row(compiled, same_as_plain="only speed differs", is_slow=True),
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
    "NAGuidance": Row(
        negative_attention,
        needs=extra("NAGuidance"),
    ),
    "ModelAttentionBackend": Row(
        lambda draft: draft.model("ModelAttentionBackend", attention="pytorch attention"),
        needs=extra("ModelAttentionBackend"),
        same_as_plain="the tests use that attention anyway",
    ),
    "FluxDisableGuidance": Row(lambda draft: draft.positive("FluxDisableGuidance")),
    "ModelComputeDtype, bf16": Row(
        lambda draft: draft.model("ModelComputeDtype", dtype="bf16"), is_rounded=True
    ),
    "FreeU": Row(
        lambda draft: draft.model("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
        REFUSED,
        "KeyError: 'model_channels'",
        why="made for U-Nets; ComfyUI's node fails on FLUX",
    ),
    "PerturbedAttentionGuidance": Row(
        lambda draft: draft.model("PerturbedAttentionGuidance", scale=3.0),
        same_as_plain=SAME_UNREAD,
    ),
    "sampler heun, cfg 2": sampler("heun", cfg=2.0),
    "sampler dpmpp_2m, scheduler beta": sampler("dpmpp_2m", "beta"),
    "sampler euler_ancestral": sampler("euler_ancestral"),
    "sampler uni_pc": sampler("uni_pc"),
    "sampler euler_cfg_pp, cfg 1": sampler("euler_cfg_pp"),
}

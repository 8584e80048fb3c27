"""Rows: the models of the family, each with what only it has.

Runs in: the tests (standard library only).

Krea and Kontext are dev's architecture with other weights. Models whose text encoder or VAE is
large get a prompt and a picture from ``node_packs/small_inputs``; the diffusion model is ComfyUI's
own.
"""

from __future__ import annotations

from collections.abc import Callable

from rig import weight_graphs
from rig.feature_graphs import SEED, VAE, Draft
from rig.feature_rows import GATHERED, PARALLEL, Row, plain
from rig.trees import Need

T5, OVIS, LONGCAT = 128, 2048, 3584  # widths of the text
NEWER_FLUX = ("comfy/ldm/flux/model.py", "yak_mlp")
LONGCAT_IMAGE = ("comfy/supported_models.py", "class LongCatImage")
TIMESTEP_ZERO = ("comfy_extras/nodes_flux.py", "index_timestep_zero")
KV_CACHE = ("comfy_extras/nodes_flux.py", "class FluxKVCache")
SAME = "the plain graph is this one"
FLUX2, KLEIN = "flux2-dev.safetensors", "flux2-klein.safetensors"

Change = Callable[[Draft], None]


def with_file(draft: Draft, name: str) -> None:
    """Use another diffusion model."""
    draft.nodes["1"]["inputs"]["unet_name"] = name


def fill(draft: Draft) -> None:
    with_file(draft, "flux1-fill-dev.safetensors")
    values = {name: draft.sampler[name] for name in ("positive", "negative")}
    inputs = {**values, "vae": VAE, "pixels": draft.picture(), "mask": draft.mask()}
    made = draft.add("InpaintModelConditioning", **inputs, noise_mask=True)
    draft.set(positive=made, negative=[made[0], 1], latent_image=[made[0], 2])


def canny(draft: Draft) -> None:
    with_file(draft, "flux1-canny-dev.safetensors")
    draft.nodes = weight_graphs.with_control(draft.nodes, 128, 128)


def kontext(draft: Draft) -> None:
    draft.reference((112, 144))


def style(draft: Draft, strength_type: str, strength: float) -> None:
    """Add a picture's style to the prompt, as Redux does."""
    made = draft.add("SmallStyle")
    inputs = {"style_model": made, "clip_vision_output": [made[0], 1]}
    draft.positive("StyleModelApply", **inputs, strength=strength, strength_type=strength_type)


def two_styles(draft: Draft) -> None:
    style(draft, "attn_bias", 0.5)
    style(draft, "attn_bias", 1.0)
    draft.set(cfg=2.0)


def uso(draft: Draft) -> None:
    made = draft.add("SmallStyleProjector")
    draft.model("USOStyleReference", model_patch=made, clip_vision_output=[made[0], 1])
    draft.reference((112, 144), method="uxo/uno")


def member(
    file: str,
    latent: str,
    *more: Change,
    width: int = T5,
    cfg: float = 1.0,
    needs: Need | None = None,
    outcome: str = PARALLEL,
    reason: str = "",
    why: str = "",
    size: tuple[int, int] = (128, 128),
    steps: int = 2,
) -> Row:
    """Return a row of a model that has a text encoder or a VAE of its own."""

    def change(draft: Draft) -> None:
        with_file(draft, file)
        draft.nodes["7"]["class_type"] = latent
        prompts = {
            "positive": draft.add("SmallPrompt", text="a harbour", width=width, num_tokens=45),
            "negative": draft.add("SmallPrompt", text="blurry", width=width, num_tokens=40),
        }
        draft.set(**prompts, cfg=cfg)
        for one in more:
            one(draft)
        for part in ("2", "4", "5", "6"):
            del draft.nodes[part]
        draft.decoded_small()

    return Row(
        change,
        outcome,
        reason,
        why,
        needs=needs,
        size=size,
        steps=steps,
        same_as_plain="another model",
    )


def flux2_references(number: int, method: str | None = None) -> Change:
    """Add reference latents of FLUX.2's own kind."""

    def change(draft: Draft) -> None:
        for width, height in ((144, 176), (96, 96), (112, 80))[:number]:
            empty = draft.add("EmptyFlux2LatentImage", width=width, height=height, batch_size=1)
            noise = draft.add("RandomNoise", noise_seed=width)
            sigmas = draft.add(
                "BasicScheduler",
                model=draft.sampler["model"],
                scheduler="simple",
                steps=1,
                denoise=1.0,
            )
            inputs = {"model": draft.sampler["model"], "noise": noise, "sigmas": sigmas}
            latent = draft.add("AddNoise", **inputs, latent_image=empty)
            draft.positive("ReferenceLatent", latent=latent)
        if method is not None:
            node = "FluxKontextMultiReferenceLatentMethod"
            draft.positive(node, reference_latents_method=method)

    return change


def kv_cache(draft: Draft) -> None:
    draft.model("FluxKVCache")


def batch(draft: Draft) -> None:
    draft.nodes["7"]["inputs"]["batch_size"] = 2


def klein(*more: Change, **values: object) -> Row:
    size = {"size": (240, 176)}
    return member(KLEIN, "EmptyFlux2LatentImage", *more, **{**size, **values})  # type: ignore[arg-type]


FLUX2_SIZE = (208, 256)
RADIANCE = "EmptyChromaRadianceLatentImage"

ROWS: dict[str, Row] = {
    "FLUX.1 dev": Row(plain, same_as_plain=SAME),
    "FLUX.1 Krea": Row(
        lambda draft: draft.set(seed=SEED + 1), why="dev's architecture with other weights"
    ),
    "FLUX.1 schnell": Row(lambda draft: with_file(draft, "flux1-schnell.safetensors")),
    "FLUX.1 Fill": Row(fill),
    "FLUX.1 Canny, Depth": Row(canny),
    "FLUX.1 Kontext": Row(kontext),
    "FLUX.1 Redux": Row(lambda draft: style(draft, "multiply", 1.0)),
    "FLUX.1 Redux, attention mask": Row(lambda draft: style(draft, "attn_bias", 0.4)),
    "FLUX.1 Redux twice, attention mask, cfg 2": Row(two_styles),
    "USO": Row(uso, GATHERED),
    "FLUX.2 dev": member(FLUX2, "EmptyFlux2LatentImage", size=FLUX2_SIZE),
    "FLUX.2 dev, two references, cfg 2": member(
        FLUX2, "EmptyFlux2LatentImage", flux2_references(2), cfg=2.0, size=FLUX2_SIZE
    ),
    "FLUX.2 klein": klein(),
    "FLUX.2 klein, three references, cfg 3, batch of 2": klein(flux2_references(3), batch, cfg=3.0),
    "FLUX.2 klein, reference, index_timestep_zero": klein(
        flux2_references(1, "index_timestep_zero"), needs=TIMESTEP_ZERO
    ),
    "FLUX.2 klein, three references, index_timestep_zero, cfg 2": klein(
        flux2_references(3, "index_timestep_zero"), cfg=2.0, needs=TIMESTEP_ZERO
    ),
    "FLUX.2 klein, FluxKVCache": klein(flux2_references(1), kv_cache, needs=KV_CACHE, steps=3),
    "FLUX.2 klein, FluxKVCache, two references, cfg 2": klein(
        flux2_references(2), kv_cache, needs=KV_CACHE, steps=3, cfg=2.0
    ),
    "Chroma": member("chroma.safetensors", "EmptySD3LatentImage"),
    "Chroma, cfg 3, batch of 2": member(
        "chroma.safetensors", "EmptySD3LatentImage", batch, cfg=3.0, size=(120, 152)
    ),
    "Chroma Radiance": member("chroma-radiance.safetensors", RADIANCE, cfg=2.0),
    "Chroma Radiance x0": member("chroma-radiance-x0.safetensors", RADIANCE, size=(112, 144)),
    "Ovis-Image": member(
        "ovis-image.safetensors", "EmptySD3LatentImage", width=OVIS, cfg=2.0, needs=NEWER_FLUX
    ),
    "LongCat-Image": member(
        "longcat-image.safetensors",
        "EmptySD3LatentImage",
        width=LONGCAT,
        cfg=2.0,
        needs=LONGCAT_IMAGE,
    ),
}

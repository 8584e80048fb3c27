"""Rows: prompts of every kind, masks, pictures to start from, batches, reference latents.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from rig.feature_graphs import OTHER_PICTURE, SEED, VAE, Draft, Link
from rig.feature_rows import Row, plain

SMALL_REFERENCES = ((112, 144), (80, 80), (96, 64))
REFERENCE_METHODS = ("offset", "index", "uxo/uno")


def combined(draft: Draft, other: Link) -> None:
    """Combine a second prompt with the first."""
    both = {"conditioning_1": draft.sampler["positive"], "conditioning_2": other}
    draft.set(positive=draft.add("ConditioningCombine", **both))


def area(draft: Draft) -> None:
    inputs = {"width": 64, "height": 96, "x": 32, "y": 16, "strength": 1.0}
    combined(draft, draft.add("ConditioningSetArea", conditioning=draft.prompt(), **inputs))


def area_of_odd_size(draft: Draft) -> None:
    inputs = {"width": 88, "height": 72, "x": 24, "y": 8, "strength": 0.7}
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


def tiled_decoding(draft: Draft) -> None:
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    draft.set(seed=SEED + 2)  # or ComfyUI would take the plain graph's result from its cache
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


def references(number: int, method: str | None = None) -> Row:
    def change(draft: Draft) -> None:
        for index, size in enumerate(SMALL_REFERENCES[:number]):
            draft.reference(size, OTHER_PICTURE if index % 2 else "rig-picture.png")
        if method is not None:
            node = "FluxKontextMultiReferenceLatentMethod"
            draft.positive(node, reference_latents_method=method)

    return Row(change)


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
    "VAEDecodeTiled": Row(tiled_decoding),
    "VAEEncodeTiled": Row(tiled_encoding),
    "batch of 3": Row(batch),
    "RepeatLatentBatch": Row(repeated_batch),
    "LatentBatchSeedBehavior": Row(one_seed_for_the_batch),
    "LatentFromBatch": Row(part_of_a_batch),
    "batch of two pictures, cfg 2": Row(batch_of_two_pictures),
    "200 x 136 px": Row(plain, size=(200, 136), same_as_plain="it is the plain one"),
    "reference latent": references(1),
    "two reference latents": references(2),
    "three reference latents": references(3),
    **{f"three reference latents, {m}": references(3, m) for m in REFERENCE_METHODS},
}

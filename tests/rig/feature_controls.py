"""Rows: ControlNets of every format, chained, scheduled, and together with other things.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from typing import Any

from rig.feature_graphs import OTHER_PICTURE, Draft
from rig.feature_rows import Row

XLABS = "flux-xlabs-canny-v3.safetensors"
INSTANTX = "flux-instantx-canny.safetensors"
INSTANTX_UNION = "flux-instantx-union.safetensors"
UNION_PRO = "flux-union-pro.safetensors"
UNION_PRO_2 = "flux-union-pro-2.safetensors"
INPAINT = "flux-instantx-inpaint.safetensors"
MISTOLINE = "flux-mistoline.safetensors"


def one(file: str, **values: Any) -> Row:
    """One ControlNet and nothing else."""
    return Row(lambda draft: draft.control(file, **values))


def two(draft: Draft) -> None:
    draft.control(XLABS, strength=0.5)
    draft.control(UNION_PRO, kind="depth", strength=0.6, picture=OTHER_PICTURE)


def two_of_one_file(draft: Draft) -> None:
    draft.control(INSTANTX, strength=0.4)
    draft.control(INSTANTX, strength=0.4, picture=OTHER_PICTURE)


def two_that_overlap(draft: Draft) -> None:
    draft.control(MISTOLINE, end=0.6)
    draft.control(INSTANTX_UNION, kind="tile", start=0.4)


def with_cfg(draft: Draft) -> None:
    draft.control(XLABS)
    draft.set(cfg=3.0)


def with_cfg_on_one_prompt(draft: Draft) -> None:
    negative = draft.sampler["negative"]
    draft.control(INSTANTX)
    draft.set(cfg=3.0, negative=negative)


def with_reference(draft: Draft) -> None:
    draft.control(UNION_PRO_2)
    draft.reference((112, 144), OTHER_PICTURE)


def with_batch(draft: Draft) -> None:
    draft.control(MISTOLINE)
    draft.nodes["7"]["inputs"]["batch_size"] = 2


def with_lora(draft: Draft) -> None:
    draft.lora()
    draft.control(INSTANTX)


def with_area(draft: Draft) -> None:
    draft.control(XLABS)
    area = draft.add(
        "ConditioningSetArea",
        conditioning=draft.prompt(),
        width=64,
        height=96,
        x=32,
        y=0,
        strength=1.0,
    )
    both = {"conditioning_1": draft.sampler["positive"], "conditioning_2": area}
    draft.set(positive=draft.add("ConditioningCombine", **both))


ROWS: dict[str, Row] = {
    "XLabs v3": one(XLABS),
    "InstantX": one(INSTANTX),
    "InstantX Union": one(INSTANTX_UNION, kind="canny/lineart/anime_lineart/mlsd"),
    "InstantX Union, mode auto": one(INSTANTX_UNION, kind="auto"),
    "Union-Pro": one(UNION_PRO, kind="tile"),
    "Union-Pro 2.0": one(UNION_PRO_2),
    "MistoLine": one(MISTOLINE),
    "InstantX inpainting (AliMama)": one(INPAINT, inpaint=True),
    "ControlNet, strength 0.3": one(INSTANTX, strength=0.3),
    "ControlNet, strength 1.5": one(XLABS, strength=1.5),
    "ControlNet, end percent 0.5": Row(lambda d: d.control(XLABS, end=0.5), steps=4),
    "ControlNet, start percent 0.5": Row(lambda d: d.control(INSTANTX, start=0.5), steps=4),
    "two ControlNets, chained": Row(two),
    "two ControlNets of one file": Row(two_of_one_file),
    "two ControlNets, ranges that overlap": Row(two_that_overlap, steps=4),
    "ControlNet, cfg 3": Row(with_cfg),
    "ControlNet on the positive prompt only, cfg 3": Row(with_cfg_on_one_prompt),
    "ControlNet, reference latent": Row(with_reference),
    "ControlNet, batch of 2": Row(with_batch),
    "ControlNet, LoRA": Row(with_lora),
    "ControlNet, area prompt": Row(with_area),
    "ControlNet, 120 x 152 px": Row(lambda draft: draft.control(UNION_PRO), size=(120, 152)),
}

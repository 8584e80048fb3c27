"""Rows: node packs, each by a stand-in of ours that uses the same mechanism.

Runs in: the tests (standard library only).

The stand-ins are in ``node_packs``. Some change the model object for good; they get a file of their
own, so that no other row meets it.
"""

from __future__ import annotations

from typing import Any

from rig import weight_graphs
from rig.feature_controls import INSTANTX_UNION, XLABS
from rig.feature_graphs import Draft
from rig.feature_rows import FALLS_BACK, GATHERED, Row, plain

OWN_FILE = "flux1-dev-own.safetensors"
GGUF_FILE = "flux1-dev-Q8_0.gguf"
ATTENTION_PATCHES = ("comfy/ldm/flux/layers.py", "attn1_patch")
REPLACED = "the workers run ComfyUI's own forward; this pack brings another one"
GLOBAL = "it replaces a function of ComfyUI or torch for all graphs"


def through(node: str, *, own_file: bool = False, **values: Any) -> Row:
    """Put a stand-in's node between the model and the sampler."""

    def change(draft: Draft) -> None:
        if own_file:
            draft.nodes["1"]["inputs"]["unet_name"] = OWN_FILE
        draft.model(node)

    return Row(change, **values)


def replaced(node: str, reason: str, *, own_file: bool = False, steps: int = 2) -> Row:
    """Return a row of a pack that brings a forward of its own."""
    return through(
        node, own_file=own_file, outcome=FALLS_BACK, reason=reason, why=REPLACED, steps=steps
    )


def gguf(draft: Draft) -> None:
    draft.nodes = weight_graphs.with_gguf(draft.nodes, GGUF_FILE)
    draft.lora()


def masked_control(draft: Draft) -> None:
    draft.control(XLABS, through="RigMaskedControl")


def masked_control_with_cfg(draft: Draft) -> None:
    masked_control(draft)
    draft.set(cfg=3.0)


def cached_control(draft: Draft) -> None:
    draft.control(INSTANTX_UNION, kind="tile")
    draft.model("RigStepCache")


ROWS: dict[str, Row] = {
    "ComfyUI-GGUF": Row(gguf),
    "Advanced-ControlNet (masked residuals)": Row(masked_control),
    "Advanced-ControlNet (masked residuals), cfg 3": Row(masked_control_with_cfg),
    "ComfyUI-MultiGPU (own model loading)": Row(
        plain, pack="own_model_loading", same_as_plain="only loading differs"
    ),
    "KJNodes, sage and flash attention": through(
        "RigOtherBackend",
        same_as_plain="another function for the same thing",
    ),
    "KJNodes, compiled blocks": through(
        "RigCompiledBlocks",
        same_as_plain="only speed differs",
    ),
    "TeaCache and WaveSpeed, compiled model": through(
        "RigCompiledModel",
        same_as_plain="only speed differs",
    ),
    "TeaCache and MagCache": through("RigStepCache", outcome=GATHERED, steps=4),
    "TeaCache and MagCache, ControlNet": Row(cached_control, GATHERED, steps=4),
    "WaveSpeed, first block cache": through("RigFirstBlockCache", outcome=GATHERED, steps=4),
    "a list of blocks replaced by one that caches": replaced(
        "RigBlocksAsOne", "block of this model by replaced_blocks.CachedBlocks", steps=4
    ),
    "PuLID": through("RigIdentity", own_file=True, outcome=GATHERED),
    "PuLID_Flux_ll (patches_replace)": through("RigReplacedBlocks", outcome=GATHERED),
    "IPAdapter-Flux": replaced("RigAdapter", "block of this model by replaced_blocks.AdapterBlock"),
    "a block around ComfyUI's": replaced(
        "RigWrapping", "block of this model by replaced_blocks.WrappingBlock"
    ),
    "XLabs": replaced("RigProcessor", "block of this model by replaced_blocks.ProcessedBlock"),
    "NAG (node pack)": through("RigNegativeGuidance", outcome=GATHERED),
    "Fluxtapoz": through("RigOwnForward", own_file=True, outcome=GATHERED),
    "DyPE": through("RigOwnPositions", outcome=GATHERED),
    "RES4LYF": replaced("RigOwnClasses", "block of this model by replaced_forward.nodes.OwnBlock"),
    "regional attention": Row(
        plain,
        FALLS_BACK,
        "attention was replaced by regional_attention",
        why=GLOBAL,
        pack="regional_attention",
        same_as_plain="the plain graph of its server has it too",
    ),
    "SageAttention3 (torch's attention)": Row(
        plain,
        FALLS_BACK,
        "scaled_dot_product_attention was replaced by torchs_attention",
        why=GLOBAL,
        pack="torchs_attention",
        same_as_plain="the plain graph of its server has it too",
    ),
    "unknown attention override": through("RigSharpened"),
    "unknown attention override, all tokens": through("RigShiftedTokens"),
    "attention override that counts its calls": through(
        "RigCounting",
        outcome=FALLS_BACK,
        reason="may keep something between calls",
        why="on several ranks each would count for itself",
    ),
    "closure that runs a block twice": through("RigTwice", outcome=GATHERED),
    "closure that counts its calls and leaves blocks out": through("RigCounted", outcome=GATHERED),
    "unknown post_input patch": through("RigPostInput", outcome=GATHERED),
    "unknown attn1_patch": through(
        "RigBeforeAttention",
        outcome=GATHERED,
        needs=ATTENTION_PATCHES,
    ),
    "unknown attn1_output_patch": through(
        "RigAfterAttention",
        outcome=GATHERED,
        needs=ATTENTION_PATCHES,
    ),
    "model_function_wrapper": through("RigFunctionWrapper"),
    "DIFFUSION_MODEL wrapper": through("RigDiffusionWrapper"),
    "forward hook on a block": through("RigHooked", own_file=True, outcome=GATHERED),
}

"""The models that can be planned without their files, by name.

Runs in: the command line's process.
"""

from __future__ import annotations

from dataclasses import replace

from comfy_xdit_patch.planning.cost.model_shape import EMBEDDING_WIDTH, ModelShape

FLUX1_DEV = ModelShape(
    name="flux1-dev",
    width=3072,
    num_double_blocks=19,
    num_single_blocks=38,
    mlp_ratio=4,
    is_gated=False,
    has_bias=True,
    modulation="blocks",
    in_width=64,  # 16 channels x 2 x 2
    out_width=64,
    text_width=4096,
    embedded=(EMBEDDING_WIDTH, EMBEDDING_WIDTH, 768),
    num_text_tokens=256,
    num_steps=20,
)

FLUX2_DEV = ModelShape(
    name="flux2-dev",
    width=6144,
    num_double_blocks=8,
    num_single_blocks=48,
    mlp_ratio=3,
    is_gated=True,
    has_bias=False,
    modulation="global",
    in_width=128,
    out_width=128,
    text_width=15360,
    embedded=(EMBEDDING_WIDTH, EMBEDDING_WIDTH),
    num_text_tokens=512,
    num_steps=20,
)

KLEIN_9B = replace(
    FLUX2_DEV,
    name="flux2-klein-9b",
    width=4096,
    num_single_blocks=24,
    text_width=12288,
    embedded=(EMBEDDING_WIDTH,),
    num_steps=4,
)

MODELS = {
    shape.name: shape
    for shape in (
        FLUX1_DEV,
        replace(
            FLUX1_DEV,
            name="flux1-schnell",
            embedded=(EMBEDDING_WIDTH, 768),
            num_steps=4,
        ),
        replace(FLUX1_DEV, name="flux1-kontext", num_references=1),
        # 16 channels of the masked image and 64 of the mask, each x 2 x 2, beside the latent.
        replace(FLUX1_DEV, name="flux1-fill", in_width=384),
        FLUX2_DEV,
        KLEIN_9B,
        replace(
            KLEIN_9B,
            name="flux2-klein-4b",
            width=3072,
            num_double_blocks=5,
            num_single_blocks=20,
            text_width=7680,
        ),
        replace(
            FLUX1_DEV,
            name="chroma",
            modulation="approximator",
            embedded=(),
            num_text_tokens=64,  # a prompt of some 50 words: Chroma's is not padded
            num_steps=26,
        ),
    )
}

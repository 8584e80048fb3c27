"""Make the diffusion models that ComfyUI's FLUX templates name, in the formats they are stored in.

Runs in: the rig's environment (torch; no ComfyUI).
"""

from __future__ import annotations

import torch

from rig import encoder_weights, family_weights, quantised, weights
from rig.checkpoints import Sizes
from rig.quantised import QuantisedFile
from rig.weights import LATENT_CHANNELS, PATCH_COLUMNS, T5_WIDTH, Maker, State

SIZES = Sizes(hidden=512)
TAPPED_LAYERS = 3  # FLUX.2 reads three layers of the language model side by side
FP8 = torch.float8_e4m3fn
# The latent, the picture that steers; or the latent, the masked picture, 8 x 8 bits of mask.
CONTROL_COLUMNS = 2 * PATCH_COLUMNS
FILL_COLUMNS = PATCH_COLUMNS + (LATENT_CHANNELS + 64) * 4

Files = dict[str, QuantisedFile]


def files() -> Files:
    """Return every diffusion model of the FLUX family beside those of ``checkpoints.py``."""
    return _flux1() | _flux2() | _chroma()


def cast(state: State, dtype: torch.dtype) -> State:
    """Return a copy in this dtype."""
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def plain(state: State, dtype: torch.dtype = torch.bfloat16) -> QuantisedFile:
    """Return a file that holds every tensor in this dtype."""
    return QuantisedFile(cast(state, dtype))


def flux1(seed: int, *, columns: int = PATCH_COLUMNS, guidance: bool = True) -> State:
    """Make a FLUX.1 model that reads this many values for each token of the image."""
    size = {"hidden": SIZES.hidden, "double": SIZES.double, "single": SIZES.single}
    state = weights.flux(**size, guidance=guidance, seed=SIZES.seed + seed)
    if columns != PATCH_COLUMNS:
        Maker(SIZES.seed + seed + 1000).linear(state, "img_in", columns, SIZES.hidden)
    return state


def flux2(seed: int, *, context: int, guidance: bool) -> State:
    """Make a FLUX.2 model for a language model whose three layers are this wide together."""
    size = {"hidden": SIZES.hidden, "double": SIZES.double, "single": SIZES.single}
    return family_weights.flux2(**size, context=context, guidance=guidance, seed=SIZES.seed + seed)


def longcat(seed: int) -> State:
    """Make a LongCat-Image model: schnell's layers without pooled text, for its language model."""
    state = {
        name.replace("_norm.scale", "_norm.weight"): tensor
        for name, tensor in flux1(seed, guidance=False).items()
        if not name.startswith("vector_in.")
    }
    context = encoder_weights.QWEN_25_7B.width
    Maker(SIZES.seed + seed + 1000).linear(state, "txt_in", context, SIZES.hidden)
    return state


def _flux1() -> Files:
    return {
        "flux1-dev-fp8.safetensors": plain(flux1(0), FP8),
        "flux1-krea-dev_fp8_scaled.safetensors": _scaled(flux1(30)),
        "flux1-dev-kontext_fp8_scaled.safetensors": _scaled(flux1(31)),
        "flux1-canny-dev.safetensors": plain(flux1(32, columns=CONTROL_COLUMNS)),
        "flux1-fill-dev.safetensors": plain(flux1(33, columns=FILL_COLUMNS)),
        "flux.1-fill-dev-OneReward-transformer_fp8.safetensors": plain(
            flux1(34, columns=FILL_COLUMNS), FP8
        ),
    }


def _flux2() -> Files:
    def mixed(state: State) -> QuantisedFile:
        return quantised.with_header(quantised.mixed(state, quantised.fp8))

    mistral, small, large = (
        TAPPED_LAYERS * model.width
        for model in (
            encoder_weights.MISTRAL_3,
            encoder_weights.QWEN_3_4B,
            encoder_weights.QWEN_3_8B,
        )
    )
    made = {
        "flux2_dev_fp8mixed.safetensors": mixed(flux2(40, context=mistral, guidance=True)),
        "flux-2-klein-base-4b.safetensors": plain(flux2(41, context=small, guidance=False)),
    }
    for number, (name, context) in enumerate(
        {
            "klein-base-4b": small,
            "klein-4b": small,
            "klein-base-9b": large,
            "klein-9b": large,
            "klein-9b-kv": large,
        }.items()
    ):
        state = flux2(42 + number, context=context, guidance=False)
        made[f"flux-2-{name}-fp8.safetensors"] = mixed(state)
    return made


def _chroma() -> Files:
    size = {"hidden": SIZES.hidden, "double": SIZES.double, "single": SIZES.single}
    chroma = family_weights.chroma(**size, context=T5_WIDTH, seed=50)
    image, velocity = (
        family_weights.radiance(**size, context=T5_WIDTH, predicts_image=is_image, seed=51)
        for is_image in (True, False)
    )
    ovis = family_weights.ovis(**size, context=encoder_weights.OVIS_25_2B.width, seed=52)
    return {
        "Chroma1-HD-fp8mixed.safetensors": quantised.with_header(
            quantised.mixed(chroma, quantised.fp8)
        ),
        "Chroma1-HD-fp8_scaled_rev2.safetensors": QuantisedFile(
            quantised.scaled_fp8(chroma, with_inputs=False)
        ),
        "chroma-radiance-x0.safetensors": plain(image),
        "Chroma1-Radiance-v0.3.safetensors": plain(velocity),
        "ovis_image_bf16.safetensors": plain(ovis),
        "longcat_image_bf16.safetensors": plain(longcat(53)),
        "longcat_image_edit_bf16.safetensors": plain(longcat(54)),
    }


def _scaled(state: State) -> QuantisedFile:
    return QuantisedFile(quantised.scaled_fp8(state, with_inputs=False))

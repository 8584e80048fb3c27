"""Write a tiny file for every model that ComfyUI's FLUX templates name.

Runs in: the rig's environment (torch; no ComfyUI).

Name, architecture and storage format are those of the published file; widths are not. As in
``checkpoints.py``, the same code gives the same bytes, and a directory is named after its code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import save_file

from rig import encoder_weights, family_weights, loras, lotus_weights, quantised, weights
from rig.checkpoints import CHECKPOINT_DTYPE, Sizes, checkpoint, models_directory
from rig.environment import cache_root
from rig.quantised import QuantisedFile
from rig.weights import LATENT_CHANNELS, PATCH_COLUMNS, T5_WIDTH, Maker, State

SIZES = Sizes(hidden=768)
SOURCES = (
    "corpus_models.py",
    "encoder_weights.py",
    "family_weights.py",
    "loras.py",
    "lotus_weights.py",
    "quantised.py",
    "weights.py",
    "checkpoints.py",
)
TAPPED_LAYERS = 3  # FLUX.2 reads three layers of the language model side by side
FP8 = torch.float8_e4m3fn
# The latent, the picture that steers; or the latent, the masked picture, 8 x 8 bits of mask.
CONTROL_COLUMNS = 2 * PATCH_COLUMNS
FILL_COLUMNS = PATCH_COLUMNS + (LATENT_CHANNELS + 64) * 4
T5_EMBEDDINGS = (
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
)
USO_LAST_BLOCKS = ("double_blocks.18.processor.qkv_lora2", "single_blocks.37.processor.qkv_lora")

Files = dict[str, QuantisedFile]


def corpus_models_directory() -> Path:
    """Return a cached, complete ``models`` directory, written if it is missing."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    name = f"corpus-h{SIZES.hidden}-{SIZES.double}+{SIZES.single}-{digest.hexdigest()[:12]}"
    directory = cache_root() / "models" / name
    if not directory.exists():
        building = directory.with_name(f".{name}.{uuid.uuid4().hex}")
        shutil.copytree(models_directory(SIZES), building, copy_function=os.link)
        for path, file in files().items():
            target = building / path
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(file.state, target, file.metadata or None)
        try:
            building.rename(directory)
        except OSError:
            shutil.rmtree(building)
    return directory


def files() -> Files:
    """Return every file beside those of ``checkpoints.py``, by path below ``models``."""
    made: Files = {}
    for folder, part in (
        ("diffusion_models", _flux1),
        ("diffusion_models", _flux2),
        ("diffusion_models", _chroma),
        ("loras", _loras),
        ("text_encoders", _text_encoders),
    ):
        made |= {f"{folder}/{name}": file for name, file in part().items()}
    schnell = checkpoint(SIZES, _cast(flux1(2, guidance=False), CHECKPOINT_DTYPE))
    made["checkpoints/flux1-schnell-fp8.safetensors"] = QuantisedFile(schnell)
    made["diffusion_models/lotus-depth-d-v1-1.safetensors"] = _plain(lotus_weights.lotus(seed=91))
    made |= _vision()
    made |= _vaes()
    return made


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


def _flux1() -> Files:
    return {
        "flux1-dev-fp8.safetensors": _plain(flux1(0), FP8),
        "flux1-krea-dev_fp8_scaled.safetensors": _scaled(flux1(30)),
        "flux1-dev-kontext_fp8_scaled.safetensors": _scaled(flux1(31)),
        "flux1-canny-dev.safetensors": _plain(flux1(32, columns=CONTROL_COLUMNS)),
        "flux1-fill-dev.safetensors": _plain(flux1(33, columns=FILL_COLUMNS)),
        "flux.1-fill-dev-OneReward-transformer_fp8.safetensors": _plain(
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
        "flux-2-klein-base-4b.safetensors": _plain(flux2(41, context=small, guidance=False)),
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
        "chroma-radiance-x0.safetensors": _plain(image),
        "Chroma1-Radiance-v0.3.safetensors": _plain(velocity),
        "ovis_image_bf16.safetensors": _plain(ovis),
    }


def _loras() -> Files:
    dev = flux1(0)
    flux2_dev = flux2(40, context=3, guidance=True)
    made = {
        "flux1-depth-dev-lora.safetensors": loras.bfl_control(dev, 60),
        "removal_timestep_alpha-2-1740.safetensors": loras.diffusers(loras.block_shapes(dev), 61),
        "uso-flux1-dit-lora-v1.safetensors": uso_lora(dev, 62),
    }
    for number, name in enumerate(("Flux_2-Turbo-LoRA_comfyui", "Flux2TurboComfyv2")):
        shapes = loras.block_shapes(flux2_dev)
        made[f"{name}.safetensors"] = loras.kohya(shapes, 63 + number)
    return {name: _plain(state) for name, state in made.items()}


def uso_lora(flux: State, seed: int) -> State:
    """Make a LoRA in USO's own names; ComfyUI knows it by the last blocks of a whole model."""
    make, state = Maker(seed), State()
    hidden = flux["img_in.weight"].shape[0]

    def add(name: str, rows: int) -> None:
        up, down = loras.pair(make, rows, hidden)
        state[f"{name}.up.weight"], state[f"{name}.down.weight"] = up, down

    for number in range(SIZES.double):
        for part, rows in (("qkv", 3 * hidden), ("proj", hidden)):
            for stream in (1, 2):
                add(f"double_blocks.{number}.processor.{part}_lora{stream}", rows)
    for name in USO_LAST_BLOCKS:
        add(name, 3 * hidden)
    return state


def _text_encoders() -> Files:
    t5 = weights.t5(seed=SIZES.seed + 11)
    plain = {name: t5.pop(name) for name in T5_EMBEDDINGS}
    scaled = quantised.scaled_fp8(t5, with_inputs=False) | _cast(plain, quantised.PLAIN_DTYPE)
    scaled["scaled_fp8"] = torch.zeros(0, dtype=FP8)  # as in the published file
    state = encoder_weights.mistral(seed=70)
    tokenizer = {"tekken_model": state.pop("tekken_model")}
    mistral = QuantisedFile(_cast(state, torch.float16) | tokenizer)
    made = {
        "t5xxl_fp8_e4m3fn_scaled.safetensors": QuantisedFile(scaled),
        "mistral_3_small_flux2_bf16.safetensors": mistral,
        "mistral_3_small_flux2_fp8.safetensors": mistral,
    }
    for number, (name, model) in enumerate(
        {
            "qwen_3_4b": encoder_weights.QWEN_3_4B,
            "qwen_3_8b_fp8mixed": encoder_weights.QWEN_3_8B,
            "ovis_2.5": encoder_weights.OVIS_25_2B,
        }.items()
    ):
        state = encoder_weights.language_model(model, seed=71 + number)
        made[f"{name}.safetensors"] = _plain(state, torch.float16)
    return made


def _vision() -> Files:
    redux = encoder_weights.redux(context=T5_WIDTH, seed=81)
    return {
        "clip_vision/sigclip_vision_patch14_384.safetensors": _plain(
            encoder_weights.siglip(seed=80), torch.float16
        ),
        "style_models/flux1-redux-dev.safetensors": _plain(redux),
    }


def _vaes() -> Files:
    def vae(decoder_width: int) -> QuantisedFile:
        state = encoder_weights.kl_vae(
            encoder_width=32, decoder_width=decoder_width, seed=SIZES.seed + 90
        )
        return QuantisedFile({name: tensor.contiguous() for name, tensor in state.items()})

    return {
        "vae/vae-ft-mse-840000-ema-pruned.safetensors": _plain(
            lotus_weights.vae(seed=92), torch.float32
        ),
        "vae/flux2-vae.safetensors": vae(decoder_width=32),
        "vae/full_encoder_small_decoder.safetensors": vae(decoder_width=64),
    }


def _plain(state: State, dtype: torch.dtype = torch.bfloat16) -> QuantisedFile:
    return QuantisedFile(_cast(state, dtype))


def _scaled(state: State) -> QuantisedFile:
    return QuantisedFile(quantised.scaled_fp8(state, with_inputs=False))


def _cast(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}

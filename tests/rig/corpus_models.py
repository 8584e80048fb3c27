"""Write a tiny file for every model that ComfyUI's FLUX templates name.

Runs in: the rig's environment (torch; no ComfyUI).

Name, architecture and storage format are those of the published file; widths are not. As in
``checkpoints.py``, the same code gives the same bytes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from rig import corpus_diffusion, encoder_weights, loras, lotus_weights, quantised, weights
from rig.checkpoints import CHECKPOINT_DTYPE, checkpoint, models_directory
from rig.corpus_diffusion import FP8, SIZES, Files, cast, flux1, flux2, plain
from rig.model_cache import model_set
from rig.quantised import QuantisedFile
from rig.weights import T5_WIDTH, Maker, State

T5_EMBEDDINGS = (
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
)
USO_LAST_BLOCKS = ("double_blocks.18.processor.qkv_lora2", "single_blocks.37.processor.qkv_lora")


def corpus_models_directory() -> Path:
    """Return a cached, complete ``models`` directory, written if it is missing."""
    return model_set("corpus", _write)


def _write(models: Path) -> None:
    # Links would change what servers that use these files see of them.
    shutil.copytree(models_directory(SIZES), models)
    for path, file in files().items():
        target = models / path
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(file.state, target, file.metadata or None)


def files() -> Files:
    """Return every file beside those of ``checkpoints.py``, by path below ``models``."""
    made: Files = {}
    for folder, part in (
        ("diffusion_models", corpus_diffusion.files),
        ("loras", _loras),
        ("text_encoders", _text_encoders),
    ):
        made |= {f"{folder}/{name}": file for name, file in part().items()}
    schnell = checkpoint(SIZES, cast(flux1(2, guidance=False), CHECKPOINT_DTYPE))
    made["checkpoints/flux1-schnell-fp8.safetensors"] = QuantisedFile(schnell)
    made["diffusion_models/lotus-depth-d-v1-1.safetensors"] = plain(lotus_weights.lotus(seed=91))
    made |= _vision()
    made |= _vaes()
    return made


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
    return {name: plain(state) for name, state in made.items()}


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
    embeddings = {name: t5.pop(name) for name in T5_EMBEDDINGS}
    scaled = quantised.scaled_fp8(t5, with_inputs=False) | cast(embeddings, quantised.PLAIN_DTYPE)
    scaled["scaled_fp8"] = torch.zeros(0, dtype=FP8)  # as in the published file
    state = encoder_weights.mistral(seed=70)
    tokenizer = {"tekken_model": state.pop("tekken_model")}
    mistral = QuantisedFile(cast(state, torch.float16) | tokenizer)
    qwen_25 = encoder_weights.language_model(encoder_weights.QWEN_25_7B, seed=74)
    qwen_25 |= encoder_weights.qwen_vision(seed=75)
    made = {
        "qwen_2.5_vl_7b_fp8_scaled.safetensors": plain(qwen_25, torch.float16),
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
        made[f"{name}.safetensors"] = plain(state, torch.float16)
    return made


def _vision() -> Files:
    redux = encoder_weights.redux(context=T5_WIDTH, seed=81)
    return {
        "clip_vision/sigclip_vision_patch14_384.safetensors": plain(
            encoder_weights.siglip(seed=80), torch.float16
        ),
        "style_models/flux1-redux-dev.safetensors": plain(redux),
        "model_patches/uso-flux1-projector-v1.safetensors": plain(
            encoder_weights.uso_projector(hidden=SIZES.hidden, seed=82)
        ),
    }


def _vaes() -> Files:
    def vae(decoder_width: int) -> QuantisedFile:
        state = encoder_weights.kl_vae(
            encoder_width=32, decoder_width=decoder_width, seed=SIZES.seed + 90
        )
        return QuantisedFile({name: tensor.contiguous() for name, tensor in state.items()})

    return {
        "vae/vae-ft-mse-840000-ema-pruned.safetensors": plain(
            lotus_weights.vae(seed=92), torch.float32
        ),
        "vae/flux2-vae.safetensors": vae(decoder_width=32),
        "vae/full_encoder_small_decoder.safetensors": vae(decoder_width=64),
    }

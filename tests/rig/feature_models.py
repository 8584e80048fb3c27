"""The models that the feature rows need: tiny ones of two blocks each, LoRAs, ControlNets.

Runs in: the rig's environment (numpy and torch; no ComfyUI).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rig import controls, family_weights, gguf_files, loras, weights
from rig.checkpoints import Sizes, models_directory
from rig.model_cache import model_set
from rig.weights import LATENT_CHANNELS, PATCH_COLUMNS, T5_WIDTH, Maker, State

# Two blocks of each kind: some patches spare one of them, and residuals differ between them.
SIZES = Sizes(hidden=384, double=2, single=2)
SEED = 60
DTYPE = torch.bfloat16
# The latent, the picture that steers; or the latent, the masked picture, 8 x 8 bits of mask.
CONTROL_COLUMNS = 2 * PATCH_COLUMNS
FILL_COLUMNS = PATCH_COLUMNS + (LATENT_CHANNELS + 64) * 4
LONGCAT_WIDTH = 3584  # ComfyUI knows the model by it
OVIS_WIDTH = 2048
GGUF = "flux1-dev-Q8_0.gguf"
LORAS = ("kohya.safetensors", "diffusers.safetensors")


def feature_models() -> Path:
    """Return a cached ``models`` directory, made if it is missing."""
    return model_set(f"{models_directory(SIZES).name}-features", _write)


def _write(models: Path) -> None:
    # Links would change what servers that use these files see of them.
    shutil.copytree(models_directory(SIZES), models)
    for name, state in controls.files(hidden=SIZES.hidden, seed=SEED).items():
        _save(models / "controlnet" / name, _cast(state))
    folder = models / "diffusion_models"
    dev = load_file(folder / "flux1-dev.safetensors")
    plain = {name: tensor.float() for name, tensor in dev.items()}
    for name, state in family().items():
        _save(folder / name, _cast(state))
    adapters = loras.files(plain, seed=SEED + 20)
    for name in LORAS:
        _save(models / "loras" / name, adapters[name])
    # For node packs that change a model for good: the same weights as another file.
    os.link(folder / "flux1-dev.safetensors", folder / "flux1-dev-own.safetensors")
    gguf_files.write(plain, folder / GGUF, gguf_files.FILES[GGUF])


def family() -> dict[str, State]:
    """Return the models beside FLUX.1 dev and schnell, by file name."""
    size = {"hidden": SIZES.hidden, "double": SIZES.double, "single": SIZES.single}
    flux1 = {
        "flux1-fill-dev.safetensors": ({"img_in": FILL_COLUMNS}, True),
        "flux1-canny-dev.safetensors": ({"img_in": CONTROL_COLUMNS}, True),
        "longcat-image.safetensors": ({"txt_in": LONGCAT_WIDTH}, False),
    }
    made: dict[str, State] = {}
    for number, (name, (inputs, guidance)) in enumerate(flux1.items()):
        state = weights.flux(**size, guidance=guidance, seed=SEED + 40 + number)
        for layer, columns in inputs.items():
            Maker(SEED + 50 + number).linear(state, layer, columns, SIZES.hidden)
        made[name] = state
    made["longcat-image.safetensors"] = {
        name.replace("_norm.scale", "_norm.weight"): tensor
        for name, tensor in made["longcat-image.safetensors"].items()
        if not name.startswith("vector_in.")
    }
    context = {"context": T5_WIDTH}
    for number, guidance in enumerate((True, False)):
        state = family_weights.flux2(**size, **context, guidance=guidance, seed=SEED + 60 + number)
        made["flux2-dev.safetensors" if guidance else "flux2-klein.safetensors"] = state
    made["chroma.safetensors"] = family_weights.chroma(**size, **context, seed=SEED + 62)
    for number, is_image in enumerate((True, False)):
        state = family_weights.radiance(
            **size, **context, predicts_image=is_image, seed=SEED + 63 + number
        )
        made["chroma-radiance-x0.safetensors" if is_image else "chroma-radiance.safetensors"] = (
            state
        )
    made["ovis-image.safetensors"] = family_weights.ovis(**size, context=OVIS_WIDTH, seed=SEED + 65)
    return made


def _cast(state: State) -> State:
    return {name: tensor.to(DTYPE).contiguous() for name, tensor in state.items()}


def _save(path: Path, state: State) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(state, path)

"""The models that the feature rows need: tiny ones of two blocks each, LoRAs, ControlNets.

Runs in: the rig's environment (numpy and torch; no ComfyUI).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rig import controls, gguf_files, loras
from rig.checkpoints import Sizes, models_directory
from rig.weights import State

# Two blocks of each kind: some patches spare one of them, and residuals differ between them.
SIZES = Sizes(hidden=384, double=2, single=2)
SEED = 60
DTYPE = torch.bfloat16
SOURCES = ("feature_models.py", "controls.py", "loras.py", "gguf_files.py")
GGUF = "flux1-dev-Q8_0.gguf"
LORAS = ("kohya.safetensors", "diffusers.safetensors")


def feature_models() -> Path:
    """Return a cached ``models`` directory, made if it is missing."""
    base = models_directory(SIZES)
    digest = hashlib.sha256(base.name.encode())
    for source in SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    directory = base.with_name(f"{base.name}-features-{digest.hexdigest()[:12]}")
    if not directory.exists():
        # Renamed when complete; if somebody else was faster, theirs has the same content.
        building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
        shutil.copytree(base, building, copy_function=os.link)
        _write(building)
        try:
            building.rename(directory)
        except OSError:
            shutil.rmtree(building)
    return directory


def _write(models: Path) -> None:
    for name, state in controls.files(hidden=SIZES.hidden, seed=SEED).items():
        _save(models / "controlnet" / name, _cast(state))
    folder = models / "diffusion_models"
    dev = load_file(folder / "flux1-dev.safetensors")
    plain = {name: tensor.float() for name, tensor in dev.items()}
    adapters = loras.files(plain, seed=SEED + 20)
    for name in LORAS:
        _save(models / "loras" / name, adapters[name])
    # For node packs that change a model for good: the same weights as another file.
    os.link(folder / "flux1-dev.safetensors", folder / "flux1-dev-own.safetensors")
    gguf_files.write(plain, folder / GGUF, gguf_files.FILES[GGUF])


def _cast(state: State) -> State:
    return {name: tensor.to(DTYPE).contiguous() for name, tensor in state.items()}


def _save(path: Path, state: State) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(state, path)

"""Write the tiny models as files, under the names that ComfyUI's templates ask for.

Runs in: the rig's environment (numpy and torch; no ComfyUI).

The same parameters give the same bytes. A directory of models is named after the hash of its
parameters, and lies in the folder of the code that made it (``model_cache.py``).

``variants`` adds what users load beside the plain files: LoRAs, quantised files, GGUF.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from rig import weights
from rig.model_cache import model_set
from rig.weights import State

TEXT_DTYPE = torch.float16
VAE_DTYPE = torch.float32
CHECKPOINT_DTYPE = torch.float8_e4m3fn
CHECKPOINT_PREFIX = "model.diffusion_model."


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The parameters of a set of models; there are ``hidden // 128`` heads."""

    hidden: int = 512
    double: int = 1
    single: int = 1
    dtype: str = "bfloat16"
    seed: int = 1
    variants: bool = False

    @property
    def num_heads(self) -> int:
        """Return the number of attention heads."""
        return self.hidden // weights.HEAD_WIDTH


def models_directory(sizes: Sizes | None = None) -> Path:
    """Return a cached, complete ``models`` directory of this size, written if it is missing."""
    sizes = sizes or Sizes()
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(sizes), sort_keys=True).encode())
    kind = "+variants" if sizes.variants else ""
    name = f"h{sizes.hidden}-{sizes.double}+{sizes.single}{kind}-{digest.hexdigest()[:12]}"
    return model_set(name, lambda building: write_models(building, sizes))


def write_models(models_dir: Path, sizes: Sizes) -> None:
    """Write every model of a set, laid out as ComfyUI's ``models`` directory."""
    if sizes.variants:
        plain = models_directory(dataclasses.replace(sizes, variants=False))
        # Links would change what servers that use these files see of them.
        shutil.copytree(plain, models_dir)
        write_variants(models_dir, sizes)
        return
    dtype = getattr(torch, sizes.dtype)
    dev = _flux(sizes, guidance=True)
    _save(models_dir / "diffusion_models" / "flux1-dev.safetensors", _cast(dev, dtype))
    schnell = _cast(_flux(sizes, guidance=False), dtype)
    _save(models_dir / "diffusion_models" / "flux1-schnell.safetensors", schnell)
    text = _text_encoders(sizes)
    _save(models_dir / "text_encoders" / "clip_l.safetensors", _cast(text["clip_l"], TEXT_DTYPE))
    _save(models_dir / "text_encoders" / "t5xxl_fp16.safetensors", _cast(text["t5xxl"], TEXT_DTYPE))
    vae = weights.vae(seed=sizes.seed + 12)
    _save(models_dir / "vae" / "ae.safetensors", _cast(vae, VAE_DTYPE))
    whole = checkpoint(sizes, _cast(dev, CHECKPOINT_DTYPE))
    _save(models_dir / "checkpoints" / "flux1-dev-fp8.safetensors", whole)


def write_variants(models_dir: Path, sizes: Sizes) -> None:
    """Add LoRAs, quantised files and GGUF files of the dev model, and a second dev model."""
    from rig import gguf_files, loras, quantised  # gguf and comfy_kitchen: not needed by the demo

    dtype = getattr(torch, sizes.dtype)
    dev = {name: tensor.to(dtype).float() for name, tensor in _flux(sizes, guidance=True).items()}
    diffusion_models, checkpoints = models_dir / "diffusion_models", models_dir / "checkpoints"
    other = _flux(dataclasses.replace(sizes, seed=sizes.seed + 100), guidance=True)
    _save(diffusion_models / "flux1-dev-other.safetensors", _cast(other, dtype))
    _save(diffusion_models / "flux1-dev-fp16.safetensors", _cast(dev, torch.float16))
    _save(diffusion_models / "flux1-dev-fp8.safetensors", _cast(dev, CHECKPOINT_DTYPE))
    vectors = {name: tensor for name, tensor in dev.items() if tensor.ndim == 1}
    _save(diffusion_models / "flux1-dev-fp32-vectors.safetensors", _cast(dev, dtype) | vectors)
    _save(checkpoints / "flux1-dev-bf16.safetensors", checkpoint(sizes, _cast(dev, dtype)))
    for name, state in loras.files(dev, seed=sizes.seed + 20).items():
        _save(models_dir / "loras" / name, state)
    for name, file in quantised.files(dev).items():
        _save(diffusion_models / name, file.state, file.metadata)
        if name in quantised.AS_CHECKPOINTS:
            _save(checkpoints / name, checkpoint(sizes, file.state))
    for name, kind in gguf_files.FILES.items():
        gguf_files.write(dev, diffusion_models / name, kind)


def checkpoint(sizes: Sizes, flux: State) -> State:
    """Put the diffusion model, text encoders and VAE into one file."""
    whole = {CHECKPOINT_PREFIX + name: tensor for name, tensor in flux.items()}
    whole |= _cast(weights.vae(seed=sizes.seed + 12), VAE_DTYPE, "vae.")
    for name, state in _text_encoders(sizes).items():
        whole |= _cast(state, TEXT_DTYPE, f"text_encoders.{name}.transformer.")
    return whole


def _text_encoders(sizes: Sizes) -> dict[str, State]:
    return {
        "clip_l": weights.clip_l(seed=sizes.seed + 10),
        "t5xxl": weights.t5(seed=sizes.seed + 11),
    }


def _flux(sizes: Sizes, *, guidance: bool) -> State:
    return weights.flux(
        hidden=sizes.hidden,
        double=sizes.double,
        single=sizes.single,
        guidance=guidance,
        seed=sizes.seed + (0 if guidance else 1),
    )


def _cast(state: State, dtype: torch.dtype, prefix: str = "") -> State:
    return {prefix + name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def _save(path: Path, state: State, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata or None)

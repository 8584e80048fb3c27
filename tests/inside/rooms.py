"""Bodies about where ComfyUI puts models: those it has to move, and those that a worker loads.

Runs in: a ComfyUI process of ``process.py``; device memory is a figure, for there is none.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch

CPU = torch.device("cpu")
NODES, OWN = "the node's", "ComfyUI's own"


class Base(torch.nn.Module):
    """A BaseModel, as far as a ModelPatcher and ComfyUI's memory manager ask."""

    def __init__(self) -> None:
        super().__init__()
        layers = comfy.ops.disable_weight_init
        self.diffusion_model = torch.nn.Sequential(
            *(layers.Linear(64, 64, dtype=torch.bfloat16) for _ in range(4))
        )
        self.device = CPU
        self.model_sampling = OWN
        self.model_lowvram = False

    def get_dtype(self) -> torch.dtype:
        return torch.bfloat16


def _loaded(extra_memory: float) -> Any:
    """A ModelPatcher in ComfyUI's list, with so much of it on the device."""
    patcher = comfy.model_patcher.ModelPatcher(Base(), load_device=CPU, offload_device=CPU)
    patcher.add_object_patch("model_sampling", NODES)
    entry = management.LoadedModel(patcher)
    patcher.partially_load(CPU, extra_memory)
    entry.real_model = weakref.ref(patcher.model)
    entry.model_finalizer = weakref.finalize(patcher.model, management.cleanup_models)
    management.current_loaded_models.insert(0, entry)
    return patcher


def made_room(needed_bytes: int | None, free_bytes: int) -> dict[str, Any]:
    """Make room for a worker while a model is sampled, a second is a guest's and one is idle."""
    from comfy_xdit_patch.host.weights.one_owner import SharedMemory

    before = list(management.current_loaded_models)
    management.current_loaded_models.clear()
    models = {"sampled": _loaded(0.1), "guest": _loaded(0.1), "idle": _loaded(1e32)}
    memory = SharedMemory([])
    memory.shares_gpu = lambda device: True  # type: ignore[method-assign]

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        return (free_bytes, 0) if torch_free_too else free_bytes

    try:
        with mock.patch.object(management, "get_free_memory", free):
            memory.make_room_for_workers(
                SimpleNamespace(away=set(), displaced=set()),
                SimpleNamespace(current_patcher=models["guest"].clone()),
                needed_bytes,
                weakref.WeakSet([models["sampled"].model]),
            )
        listed = [entry.model.model for entry in management.current_loaded_models]
        return {
            name: [patcher.model in listed, patcher.model.model_sampling]
            for name, patcher in models.items()
        }
    finally:
        management.current_loaded_models[:] = before


def loaded_by_a_worker(path: str, loader: str) -> dict[str, Any]:
    """Load as a worker does while ComfyUI finds the device, for which meta stands, better."""
    from comfy_xdit_patch.worker.weights.loading import mapped_weights

    loads: list[Any] = []

    def device(*_: Any) -> torch.device:
        return torch.device("meta")

    with (
        mock.patch.object(management, "unet_inital_load_device", device),
        mock.patch.object(management, "unet_offload_device", device),
        mock.patch.object(management, "load_models_gpu", lambda *a, **k: loads.append(a)),
    ):
        with mapped_weights():
            if loader == "checkpoint":
                options = dict.fromkeys(("output_vae", "output_clip", "output_clipvision"), False)
                patcher = comfy.sd.load_checkpoint_guess_config(path, **options)[0]
            else:
                patcher = comfy.sd.load_diffusion_model(path)
        is_put_back = management.unet_inital_load_device is device
    return {
        "places": sorted({str(weight.device) for weight in patcher.model.parameters()}),
        "offload": str(patcher.offload_device),
        "loads": len(loads),
        "put back": is_put_back,
    }


def loaded_for_another_card(path: str) -> dict[str, Any]:
    """Load as a worker does whose own card would have ComfyUI choose other dtypes."""
    from comfy_xdit_patch.worker.weights.loading import mapped_weights

    before = management.unet_dtype
    with mapped_weights(dtypes=[torch.float8_e4m3fn, torch.bfloat16]):
        patcher = comfy.sd.load_diffusion_model(path)
    return {
        "weights": sorted({str(weight.dtype) for weight in patcher.model.parameters()}),
        "compute": str(patcher.model.manual_cast_dtype),
        "put back": management.unet_dtype is before,
    }


def misplaced() -> str:
    """Say what a worker says of a weight that ComfyUI put somewhere else than in CPU memory."""
    from comfy_xdit_patch.errors import WorkerError
    from comfy_xdit_patch.worker.weights import loading

    weight = SimpleNamespace(device=torch.device("cuda", 0))
    model: Any = SimpleNamespace(named_parameters=lambda: [("img_in.weight", weight)])
    try:
        loading._check_places("a file", model)
    except WorkerError as error:
        return str(error)
    return ""

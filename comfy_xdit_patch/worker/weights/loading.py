"""Load a model's weights with ComfyUI's own loaders, from the file's own pages.

Runs in: worker process.

ComfyUI makes a module of empty weights and copies the file into it. N workers would so own N
copies of a file that the page cache holds already. Here the file's mapped tensors are put in the
place of the empty ones: all workers, and the host while it reads, share one copy, and only weights
that are cast or patched are memory of a rank's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.wire.files import file_identity
from comfy_xdit_patch.wire.messages.requests import ModelSource
from comfy_xdit_patch.wire.tensors import dtype_of


def load_patcher(source: ModelSource) -> Any:
    """Load the diffusion model of a file, and only that: no text encoder, no VAE.

    Raises:
        WorkerError: the file is not the one that the host read.
    """
    import comfy.sd

    _check_file(source)
    options = {
        name: _dtype(value) if name == "dtype" else value for name, value in source.options.items()
    }
    with mapped_weights(source.uncast, [_dtype(name) for name in source.dtypes]):
        if source.loader == "load_diffusion_model":
            patcher = comfy.sd.load_diffusion_model(source.path, model_options=options)
        elif source.loader == "load_controlnet":
            patcher = _controlnet(source.path, options)
        else:
            patcher = comfy.sd.load_checkpoint_guess_config(
                source.path,
                output_vae=False,
                output_clip=False,
                output_clipvision=False,
                model_options=options,
            )[0]
    _check_places(source.path, patcher.model)
    _check_file(source)
    return patcher


def _check_file(source: ModelSource) -> None:
    if file_identity(source.path) != source.file:
        raise WorkerError(f"{source.path} was changed after ComfyUI read it.")


def _check_places(path: str, model: torch.nn.Module) -> None:
    """See that no weight is on a device yet: a worker could never give it back.

    Raises:
        WorkerError: a weight is on a device.
    """
    for name, weight in model.named_parameters():
        if weight.device.type not in WITHOUT_DEVICE_MEMORY:
            raise WorkerError(f"{path}: ComfyUI loaded {name} onto {weight.device} by itself.")


WITHOUT_DEVICE_MEMORY = ("cpu", "meta")


class _Holder(torch.nn.Module):
    """Gives a ControlNet's module the place that a diffusion model has in ComfyUI's BaseModel."""

    def __init__(self, control: Any) -> None:
        super().__init__()
        self.diffusion_model = control.control_model
        self.manual_cast_dtype = control.manual_cast_dtype


def _controlnet(path: str, options: dict[str, Any]) -> Any:
    import comfy.controlnet
    import comfy.model_patcher

    control = comfy.controlnet.load_controlnet(path, model_options=options)
    return comfy.model_patcher.ModelPatcher(
        _Holder(control),
        load_device=control.control_model_wrapped.load_device,
        offload_device=control.control_model_wrapped.offload_device,
    )


def _dtype(name: str) -> torch.dtype | None:
    return dtype_of(name) if name else None


@contextmanager
def mapped_weights(
    uncast: Collection[str] = (), dtypes: Sequence[torch.dtype | None] = ()
) -> Iterator[None]:
    """While this lasts, modules take the tensors that they are given, where these are.

    They are not copied into the module's own, and those in ``uncast`` keep their dtype. And
    ComfyUI, which loads a checkpoint's model onto the device at once if that has more free memory
    than the machine, finds CPU memory better; and it chooses ``dtypes`` (of weights, and to compute
    in) as it did in the host, whose card may be of another kind.
    """
    import comfy.model_management as management

    def cpu(*_: Any, **__: Any) -> torch.device:
        return torch.device("cpu")

    answers: dict[str, Any] = {"unet_inital_load_device": cpu, "unet_offload_device": cpu}
    if dtypes:
        answers["unet_dtype"] = lambda *_, **__: dtypes[0]
        answers["unet_manual_cast"] = lambda *_, **__: dtypes[1]
    choices = {name: getattr(management, name) for name in answers}
    copying = torch.nn.Module.load_state_dict

    def load_state_dict(
        module: torch.nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = True
    ) -> Any:
        wanted = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        cast = wanted.keys() - set(uncast)
        fitting = {
            # What copying would do: the module's dtype is the user's choice, the file's is not.
            name: tensor.to(wanted[name].dtype) if name in cast else tensor
            for name, tensor in state.items()
        }
        return copying(module, fitting, strict=strict, assign=True)

    torch.nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign,assignment]
    vars(management).update(answers)
    try:
        yield
    finally:
        vars(management).update(choices)
        torch.nn.Module.load_state_dict = copying  # type: ignore[method-assign]

"""The loader node, and a ModelPatcher that leaves patches on quantised weights.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths

from .layers import Operations
from .tensors import is_quantised, read

FOLDER = "unet_gguf"
folder_paths.folder_names_and_paths[FOLDER] = (
    folder_paths.get_folder_paths("diffusion_models"),
    {".gguf"},
)


class Patcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """Put weight patches on quantised weights, where each call of the layer applies them."""

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, **kwargs: Any
    ) -> Any:
        """Leave the bytes alone and remember the patches; other weights go ComfyUI's way."""
        weight = comfy.utils.get_attr(self.model, key)
        if not is_quantised(weight):
            return super().patch_weight_to_device(key, device_to, inplace_update, **kwargs)
        if key in self.patches:
            patched = weight.to(device_to)
            patched.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, patched)
        return None

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        """Take the patches off again."""
        if unpatch_weights:
            for parameter in self.model.parameters():
                if is_quantised(parameter):
                    parameter.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Patch now even what ComfyUI would patch at each call: it does not know these layers."""
        return super().load(*args, **{**kwargs, "force_patch_weights": True})

    def clone(self, *args: Any, **kwargs: Any) -> Patcher:
        """Return a copy of this class, whatever class ComfyUI made."""
        original = self.__class__
        self.__class__ = Patcher
        try:
            copy = super().clone(*args, **kwargs)
        finally:
            self.__class__ = original
        copy.__class__ = Patcher
        return copy


class UnetLoaderGGUF:
    """Load a diffusion model from a GGUF file."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """Return the one input, named as the real pack names it."""
        return {"required": {"unet_name": (folder_paths.get_filename_list(FOLDER),)}}

    def load(self, unet_name: str) -> tuple[Any]:
        """Return the patcher of the model."""
        state = read(folder_paths.get_full_path_or_raise("diffusion_models", unet_name))
        options = {"custom_operations": Operations()}
        patcher = comfy.sd.load_diffusion_model_state_dict(state, model_options=options)
        if patcher is None:
            raise RuntimeError(f"{unet_name} is not a diffusion model that ComfyUI knows.")
        return (Patcher.clone(patcher),)


NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": UnetLoaderGGUF}

"""Let ComfyUI load the rig's tiny models: read the widths it hard-codes from the file instead.

Runs in: every Python process of a rig server, workers too (this directory is first on PYTHONPATH).

Text encoders: the widths of T5 and CLIP-L go through ComfyUI's own override channel
(``model_options["t5xxl_model_config"]``), in both loaders. Diffusion model: ComfyUI before 0.4
takes 24 heads for granted; later versions compute hidden width // 128, and so does this shim.
Chroma's width and those of its approximator are hard-coded in both.
``RIG_SHIM_DIFFUSION=0`` leaves the diffusion model alone. For files of the usual widths every
override equals ComfyUI's own value. Only loading is touched, never sampling.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("EMULATED_CARDS"):
    import emulated_cuda  # noqa: F401 - before anything asks torch for a device

import rig_shim_corpus
import rig_shim_door
import rig_shim_faults
import rig_shim_nodes
import rig_shim_trace  # noqa: F401 - with RIG_TRACE it looks on from here

TYPE_CHECKING = False  # typing and importlib.util are slow to import at every start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from importlib.machinery import ModuleSpec
    from typing import Any

    Options = dict[str, Any]
    StateDict = Mapping[str, Any]

HEAD_WIDTH = 128  # of FLUX, in every size
CLIP_HEAD_WIDTH = 64
T5_PREFIXES = ("", "text_encoders.t5xxl.transformer.")
CLIP_PREFIXES = ("", "text_encoders.clip_l.transformer.")


def text_encoder_options(state_dict: StateDict) -> Options:
    """Return the overrides that make ComfyUI build the text encoders of this file."""
    options: Options = {}
    for prefix in T5_PREFIXES:
        block = prefix + "encoder.block.0.layer."
        bias = state_dict.get(block + "0.SelfAttention.relative_attention_bias.weight")
        if bias is not None:
            num_heads = bias.shape[1]
            options["t5xxl_model_config"] = {
                "d_model": state_dict[prefix + "shared.weight"].shape[1],
                "d_ff": state_dict[block + "1.DenseReluDense.wi_1.weight"].shape[0],
                "d_kv": state_dict[block + "0.SelfAttention.q.weight"].shape[0] // num_heads,
                "num_heads": num_heads,
                "num_layers": _count(state_dict, prefix + "encoder.block."),
            }
    for prefix in CLIP_PREFIXES:
        width = state_dict.get(prefix + "text_model.embeddings.token_embedding.weight")
        if width is not None and width.shape[1] <= 768:  # CLIP-G, which is wider, is not ours
            layers = prefix + "text_model.encoder.layers."
            options["clip_l_model_config"] = {
                "hidden_size": width.shape[1],
                "intermediate_size": state_dict[layers + "0.mlp.fc1.weight"].shape[0],
                "num_attention_heads": width.shape[1] // CLIP_HEAD_WIDTH,
                "num_hidden_layers": _count(state_dict, layers),
            }
    return options


def _count(state_dict: StateDict, prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state_dict if k.startswith(prefix))


def adapt_text_encoder_files(long_clipl: Any) -> None:
    """Add the overrides where ComfyUI itself reads CLIP's number of positions from each file."""
    read = long_clipl.model_options_long_clip

    def model_options_long_clip(
        state_dict: StateDict, tokenizer_data: Options, model_options: Options
    ) -> tuple[Options, Options]:
        tokenizer_data, model_options = read(state_dict, tokenizer_data, model_options)
        model_options = dict(model_options)
        overrides = text_encoder_options(state_dict)
        overrides |= rig_shim_corpus.language_model_options(state_dict)
        for name, config in overrides.items():
            model_options[name] = {**config, **model_options.get(name, {})}
        return tokenizer_data, model_options

    long_clipl.model_options_long_clip = model_options_long_clip


def adapt_checkpoints(sd: Any) -> None:
    """Add the overrides for text encoders that are part of a checkpoint."""
    load = sd.load_state_dict_guess_config

    def load_state_dict_guess_config(state_dict: StateDict, *args: Any, **kwargs: Any) -> Any:
        options = text_encoder_options(state_dict)
        kwargs["te_model_options"] = {**options, **kwargs.get("te_model_options", {})}
        return load(state_dict, *args, **kwargs)

    sd.load_state_dict_guess_config = load_state_dict_guess_config


def adapt_diffusion_model(model_detection: Any) -> None:
    """Let the number of heads, and Chroma's widths, follow the file."""
    detect = model_detection.detect_unet_config

    def detect_unet_config(
        state_dict: StateDict, key_prefix: str, *args: Any, **kwargs: Any
    ) -> Any:
        config = detect(state_dict, key_prefix, *args, **kwargs)
        kind = None if config is None else config.get("image_model")
        if kind in ("flux", "flux2"):
            config["num_heads"] = config["hidden_size"] // HEAD_WIDTH
        if kind in ("chroma", "chroma_radiance"):
            config["hidden_size"] = state_dict[key_prefix + "txt_in.weight"].shape[0]
            config["num_heads"] = config["hidden_size"] // HEAD_WIDTH
            layer = key_prefix + "distilled_guidance_layer."
            config["out_dim"] = state_dict[layer + "out_proj.weight"].shape[0]
            config["hidden_dim"] = state_dict[layer + "in_proj.weight"].shape[0]
            config["n_layers"] = _count(state_dict, layer + "layers.")
        return config

    model_detection.detect_unet_config = detect_unet_config


class Finder:
    """Run adaptations right after a module of ComfyUI was executed."""

    def __init__(self, adaptations: Mapping[str, list[Callable[[Any], None]]]) -> None:
        self.adaptations = adaptations
        self.busy: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find the module as the others would, and wrap its loader."""
        adaptations = self.adaptations.get(name)
        if adaptations is None or name in self.busy:
            return None
        import importlib.util

        self.busy.add(name)
        try:
            spec = importlib.util.find_spec(name)  # nested: all other finders get their turn
        finally:
            self.busy.discard(name)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for adapt in adaptations:
                adapt(module)

        loader.exec_module = exec_module
        return spec


_adaptations: Mapping[str, list[Callable[[Any], None]]] = {
    "comfy.text_encoders.long_clipl": [adapt_text_encoder_files],
    "comfy.sd": [
        adapt_checkpoints,
        rig_shim_corpus.adapt_text_encoder_kinds,
        rig_shim_corpus.adapt_vae,
    ],
    "server": [rig_shim_door.adapt_server],
    "nodes": [rig_shim_nodes.adapt_node_loader],
    "comfy.supported_models": [rig_shim_corpus.adapt_lotus, rig_shim_corpus.adapt_longcat],
    "comfy.text_encoders.qwen_vl": [rig_shim_corpus.adapt_qwen_vision],
    "comfy.clip_vision": [rig_shim_corpus.adapt_vision],
    "comfy.ldm.flux.redux": [rig_shim_corpus.adapt_redux],
    "comfy.text_encoders.flux": [rig_shim_corpus.adapt_mistral_tokenizer],
}
if os.environ.get("RIG_SHIM_DIFFUSION") != "0":
    diffusion_model: list[Callable[[Any], None]] = [
        adapt_diffusion_model,
        rig_shim_corpus.adapt_detection,
    ]
    _adaptations = {**_adaptations, "comfy.model_detection": diffusion_model}
sys.meta_path.insert(0, Finder({**_adaptations, **rig_shim_faults.adaptations()}))

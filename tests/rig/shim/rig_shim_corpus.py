"""Let ComfyUI load the tiny models of the workflow corpus: what it hard-codes follows the file.

Runs in: every Python process of a rig server, workers too; ``sitecustomize`` imports it.

The same rules as there: a file of the usual widths gives ComfyUI's own values, and only loading is
touched. Language models that are less than ``NARROW`` wide are taken for the published model that
is 64 times as wide. One thing is no width: ComfyUI 0.3.75 was written for transformers 4, and its
reader of Mistral's tokenizer does not run with transformers 5, which this environment has.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Options = dict[str, Any]
    StateDict = Mapping[str, Any]

HEAD_WIDTH = 128
LOTUS_HEAD_WIDTH = 64
NARROW = 1024
NARROWER = 64
LANGUAGE_NORM = "model.layers.0.post_attention_layernorm.weight"
LANGUAGE_MODELS = {
    5120: "mistral3_24b",
    4096: "qwen3_8b",
    3584: "qwen25_7b",
    2560: "qwen3_4b",
    2048: "qwen3_2b",
}
LONGCAT_CONTEXT = 3584
QWEN_VISION_NARROWER = 8
T5_XXL_KEY = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
T5_XL_FF = 5120
VISION_HEAD_WIDTH = 72
VISION_POSITIONS = 729
VISION_LAYER = "vision_model.encoder.layers."


def language_model_options(state_dict: StateDict) -> Options:
    """Return the overrides that make ComfyUI build the language model of this file."""
    norm = state_dict.get(LANGUAGE_NORM)
    name = None if norm is None else LANGUAGE_MODELS.get(norm.shape[0] * NARROWER)
    if name is None or norm is None or norm.shape[0] >= NARROW:
        return {}
    layer = "model.layers.0."
    vocabulary, width = state_dict["model.embed_tokens.weight"].shape
    return {
        f"{name}_model_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": state_dict[layer + "mlp.up_proj.weight"].shape[0],
            "num_hidden_layers": count(state_dict, "model.layers."),
            "num_attention_heads": _rows(state_dict, layer + "self_attn.q_proj") // HEAD_WIDTH,
            "num_key_value_heads": _rows(state_dict, layer + "self_attn.k_proj") // HEAD_WIDTH,
        }
    }


def adapt_text_encoder_kinds(sd: Any) -> None:
    """Recognise narrow text encoders, which ComfyUI knows by their width."""
    detect = sd.detect_te_model

    def detect_te_model(state_dict: StateDict) -> Any:
        if T5_XXL_KEY in state_dict and state_dict[T5_XXL_KEY].shape[0] < T5_XL_FF:
            return sd.TEModel.T5_XXL
        norm = state_dict.get(LANGUAGE_NORM)
        if norm is not None and norm.shape[0] < NARROW:
            published = norm.new_empty((norm.shape[0] * NARROWER,), device="meta")
            state_dict = {**state_dict, LANGUAGE_NORM: published}
        return detect(state_dict)

    sd.detect_te_model = detect_te_model


def adapt_vae(sd: Any) -> None:
    """Let the widths of a KL VAE follow the file; ComfyUI reads them in part, or not at all."""
    construct = sd.VAE.__init__

    def load(self: Any, sd: Any = None, *args: Any, **kwargs: Any) -> None:
        from comfy.ldm.modules.diffusionmodules import model

        written = None if sd is None else sd.get("encoder.conv_in.weight")
        if written is None or written.ndim != 4 or "bn.running_mean" not in sd:
            construct(self, sd, *args, **kwargs)
            return
        widths = {
            model.Encoder: lambda factor: written.shape[0],
            model.Decoder: lambda factor: sd["decoder.conv_in.weight"].shape[0] // factor,
        }
        originals = {part: part.__init__ for part in widths}
        try:
            for part, width in widths.items():
                part.__init__ = _with_width(originals[part], width)
            construct(self, sd, *args, **kwargs)
        finally:
            for part, original in originals.items():
                part.__init__ = original

    sd.VAE.__init__ = load


def _with_width(original: Callable[..., None], width: Callable[[int], int]) -> Callable[..., None]:
    def construct(self: Any, **config: Any) -> None:
        original(self, **{**config, "ch": width(config["ch_mult"][-1])})

    return construct


def adapt_vision(clip_vision: Any) -> None:
    """Let SigLIP's widths follow the file."""
    load = clip_vision.load_clipvision_from_sd

    def load_clipvision_from_sd(state_dict: StateDict, *args: Any, **kwargs: Any) -> Any:
        positions = state_dict.get("vision_model.embeddings.position_embedding.weight")
        if positions is None or positions.shape[0] != VISION_POSITIONS:
            return load(state_dict, *args, **kwargs)
        import json
        import tempfile
        from pathlib import Path

        path = Path(clip_vision.__file__).with_name("clip_vision_siglip_384.json")
        config = json.loads(path.read_text())
        config["hidden_size"] = positions.shape[1]
        config["num_attention_heads"] = positions.shape[1] // VISION_HEAD_WIDTH
        config["intermediate_size"] = _rows(state_dict, VISION_LAYER + "0.mlp.fc1")
        config["num_hidden_layers"] = count(state_dict, VISION_LAYER)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(config, file)  # ComfyUI 0.3.75 reads nothing but files
            file.flush()
            clip = clip_vision.ClipVisionModel(file.name)
        clip.load_sd(state_dict)
        return clip

    clip_vision.load_clipvision_from_sd = load_clipvision_from_sd


def adapt_redux(redux: Any) -> None:
    """Let Redux's widths follow the file."""

    class ReduxImageEncoder(redux.ReduxImageEncoder):  # type: ignore[misc]
        def load_state_dict(self, state_dict: StateDict, *args: Any, **kwargs: Any) -> Any:
            widths = state_dict["redux_up.weight"].shape[1], _rows(state_dict, "redux_down")
            self.__init__(*widths, device=self.device, dtype=self.dtype)  # type: ignore[misc]
            return super().load_state_dict(state_dict, *args, **kwargs)

    redux.ReduxImageEncoder = ReduxImageEncoder


def adapt_qwen_vision(qwen_vl: Any) -> None:
    """Give a narrow Qwen2.5-VL narrow eyes: an eighth of the width, heads as wide as published."""
    construct = qwen_vl.Qwen2VLVisionTransformer.__init__

    def construct_narrow(
        self: Any, hidden_size: int, output_hidden_size: int, **kwargs: Any
    ) -> None:
        if output_hidden_size < NARROW:
            kwargs["intermediate_size"] = 3420 // QWEN_VISION_NARROWER
            kwargs["num_heads"] = 16 // QWEN_VISION_NARROWER
            hidden_size //= QWEN_VISION_NARROWER
        construct(self, hidden_size, output_hidden_size, **kwargs)

    qwen_vl.Qwen2VLVisionTransformer.__init__ = construct_narrow


def adapt_longcat(supported_models: Any) -> None:
    """Recognise a LongCat-Image model for a narrow language model."""
    longcat = getattr(supported_models, "LongCatImage", None)
    if longcat is None:
        return  # ComfyUI 0.3.75 does not know the model
    matches = longcat.matches

    def matches_narrow(unet_config: Options, *args: Any, **kwargs: Any) -> Any:
        if unet_config.get("context_in_dim") == LONGCAT_CONTEXT // NARROWER:
            unet_config = {**unet_config, "context_in_dim": LONGCAT_CONTEXT}
        return matches(unet_config, *args, **kwargs)

    longcat.matches = staticmethod(matches_narrow)


def adapt_detection(model_detection: Any) -> None:
    """Let the widths of Chroma Radiance's pixel head, and LongCat-Image's text, follow the file."""
    detect = model_detection.detect_unet_config

    def detect_unet_config(
        state_dict: StateDict, key_prefix: str, *args: Any, **kwargs: Any
    ) -> Any:
        config = detect(state_dict, key_prefix, *args, **kwargs)
        kind = None if config is None else config.get("image_model")
        if kind == "flux" and config.get("context_in_dim") == LONGCAT_CONTEXT // NARROWER:
            config["txt_ids_dims"] = [1, 2]
        if kind == "chroma_radiance":
            embedder = key_prefix + "nerf_image_embedder.embedder.0"
            config["nerf_hidden_size"] = _rows(state_dict, embedder)
            config["nerf_depth"] = count(state_dict, key_prefix + "nerf_blocks.")
        return config

    model_detection.detect_unet_config = detect_unet_config


def adapt_lotus(supported_models: Any) -> None:
    """Give Lotus its width of a head also where the file has ComfyUI's own names for its layers.

    ComfyUI 0.3.75 adds it for diffusers' names only; later versions have this very line.
    """
    supported_models.LotusD.unet_extra_config.setdefault("num_head_channels", LOTUS_HEAD_WIDTH)


def adapt_mistral_tokenizer(flux: Any) -> None:
    """Read Mistral's tokenizer by way of transformers 5, where ComfyUI expects transformers 4."""
    if hasattr(flux, "from_tekken_json"):
        return  # this ComfyUI has a reader of its own

    def load_mistral_tokenizer(data: Any) -> Options:
        import tempfile

        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.mistral import (  # type: ignore[attr-defined]
            MistralConverter,
        )

        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            file.write(data.numpy().tobytes())
            file.flush()
            tokenizer = MistralConverter(file.name).converted()
        start = "<s>", tokenizer.token_to_id("<s>")
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
        return {"tokenizer": made}

    class MistralTokenizerClass:
        @staticmethod
        def from_pretrained(path: str, *, tokenizer: Any) -> Any:
            return tokenizer

    flux.load_mistral_tokenizer = load_mistral_tokenizer
    flux.MistralTokenizerClass = MistralTokenizerClass


def count(state_dict: StateDict, prefix: str) -> int:
    """Return the number of blocks whose names start like this."""
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state_dict if k.startswith(prefix))


def _rows(state_dict: StateDict, layer: str) -> int:
    rows: int = state_dict[layer + ".weight"].shape[0]
    return rows

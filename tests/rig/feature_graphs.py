"""Build feature graphs: a draft that starts as the plain graph and is changed node by node.

Runs in: the rig's environment and the tests (standard library only).
"""

from __future__ import annotations

import copy
from typing import Any

from rig import graphs
from rig.graphs import Graph

SIZE = 128
STEPS = 2
SEED = 31
PICTURE, OTHER_PICTURE, MASK = "rig-picture.png", "rig-other.png", "rig-mask.png"

LOADER, CLIP, VAE = ["1", 0], ["2", 0], ["3", 0]
POSITIVE, NEGATIVE, GUIDED = "4", "5", "6"
EMPTY, SAMPLER, DECODER, SAVER = "7", "8", "9", "10"
OTHER_PROMPT = "a red fishing boat on calm water, morning fog, watercolour"

Link = list[Any]


class Draft:
    """A graph under change; what the sampler reads can be read and replaced by name."""

    def __init__(self, size: tuple[int, int] = (SIZE, SIZE), steps: int = STEPS) -> None:
        plain = graphs.load("ksampler_dev")
        self.nodes: Graph = graphs.with_values(
            plain, seed=SEED, size=size, steps=steps, save_latent=True
        )

    def add(self, class_type: str, **inputs: Any) -> Link:
        """Add a node and return its first output."""
        number = f"new-{len(self.nodes)}"
        self.nodes[number] = {"class_type": class_type, "inputs": inputs}
        return [number, 0]

    @property
    def sampler(self) -> dict[str, Any]:
        """The inputs of the sampler."""
        inputs: dict[str, Any] = self.nodes[SAMPLER]["inputs"]
        return inputs

    def set(self, **inputs: Any) -> None:
        """Set inputs of the sampler."""
        self.sampler.update(inputs)

    def model(self, class_type: str, **inputs: Any) -> None:
        """Put a node between the model and the sampler."""
        self.set(model=self.add(class_type, model=self.sampler["model"], **inputs))

    def positive(self, class_type: str, **inputs: Any) -> None:
        """Put a node between the positive prompt and the sampler."""
        self.set(positive=self.add(class_type, conditioning=self.sampler["positive"], **inputs))

    def latent(self, class_type: str, **inputs: Any) -> None:
        """Put a node between the latent and the sampler."""
        self.set(latent_image=self.add(class_type, samples=self.sampler["latent_image"], **inputs))

    def prompt(self, text: str = OTHER_PROMPT) -> Link:
        """Encode a further prompt."""
        return self.add("CLIPTextEncode", text=text, clip=CLIP)

    def lora(self, name: str = "kohya.safetensors", strength: float = 1.0) -> None:
        """Add a LoRA."""
        self.model("LoraLoaderModelOnly", lora_name=name, strength_model=strength)

    def picture(self, name: str = PICTURE, size: tuple[int, int] = (SIZE, SIZE)) -> Link:
        """Load a picture, scaled."""
        loaded = self.add("LoadImage", image=name)
        width, height = size
        return self.add(
            "ImageScale",
            image=loaded,
            upscale_method="bilinear",
            width=width,
            height=height,
            crop="disabled",
        )

    def mask(self) -> Link:
        """Load the mask."""
        return self.add("LoadImageMask", image=MASK, channel="red")

    def encoded(self, name: str = PICTURE, size: tuple[int, int] = (SIZE, SIZE)) -> Link:
        """Encode a picture to a latent."""
        return self.add("VAEEncode", pixels=self.picture(name, size), vae=VAE)

    def reference(
        self, size: tuple[int, int], name: str = PICTURE, method: str | None = None
    ) -> None:
        """Add a reference latent to the positive prompt."""
        self.positive("ReferenceLatent", latent=self.encoded(name, size))
        if method is not None:
            self.positive("FluxKontextMultiReferenceLatentMethod", reference_latents_method=method)

    def control(
        self,
        file: str,
        *,
        kind: str | None = None,
        inpaint: bool = False,
        strength: float = 0.8,
        start: float = 0.0,
        end: float = 1.0,
        picture: str = PICTURE,
        through: str | None = None,
    ) -> None:
        """Steer by a ControlNet; ``through`` is a node that changes it first."""
        net = self.add("ControlNetLoader", control_net_name=file)
        if kind is not None:
            net = self.add("SetUnionControlNetType", control_net=net, type=kind)
        if through is not None:
            net = self.add(through, control_net=net, mask=self.mask())
        inputs = {
            "positive": self.sampler["positive"],
            "negative": self.sampler["negative"],
            "control_net": net,
            "vae": VAE,
            "image": self.picture(picture),
            "strength": strength,
            "start_percent": start,
            "end_percent": end,
        }
        if inpaint:
            applied = self.add("ControlNetInpaintingAliMamaApply", **inputs, mask=self.mask())
        else:
            applied = self.add("ControlNetApplyAdvanced", **inputs)
        self.set(positive=applied, negative=[applied[0], 1])

    def again(self, latent: Link, class_type: str = "KSampler", **inputs: Any) -> Link:
        """Sample once more with the same inputs but these; its result is decoded instead."""
        result = self.add(class_type, **{**self.sampler, "latent_image": latent, **inputs})
        self.nodes[DECODER]["inputs"]["samples"] = result
        saved = {"samples": result, "filename_prefix": "latents/again"}
        self.nodes[f"{result[0]}-saved"] = {"class_type": "SaveLatent", "inputs": saved}
        return result

    def advanced(self, **inputs: Any) -> None:
        """Sample with KSamplerAdvanced."""
        values = {name: v for name, v in self.sampler.items() if name not in ("seed", "denoise")}
        values |= {
            "add_noise": "enable",
            "noise_seed": SEED,
            "return_with_leftover_noise": "disable",
        }
        values |= {"start_at_step": 0, "end_at_step": 10000, **inputs}
        self.nodes[SAMPLER] = {"class_type": "KSamplerAdvanced", "inputs": values}

    def guided_by(self, guider: str, steps: int = STEPS, **inputs: Any) -> None:
        """Sample with SamplerCustomAdvanced and this guider."""
        model = self.sampler["model"]
        sampler = {
            "noise": self.add("RandomNoise", noise_seed=SEED),
            "guider": self.add(guider, model=model, **inputs),
            "sampler": self.add("KSamplerSelect", sampler_name="euler"),
            "sigmas": self.add(
                "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0
            ),
            "latent_image": self.sampler["latent_image"],
        }
        self.nodes[SAMPLER] = {"class_type": "SamplerCustomAdvanced", "inputs": sampler}

    def decoded_small(self) -> None:
        """Make the picture of a latent without its VAE."""
        self.nodes[DECODER] = {"class_type": "SmallDecode", "inputs": {"samples": [SAMPLER, 0]}}

    def finished(self) -> Graph:
        """Return the graph."""
        return copy.deepcopy(self.nodes)

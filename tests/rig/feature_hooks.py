"""Rows: LoRAs that ComfyUI's hooks lay over the weights for some calls, and bypass LoRAs.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

from rig.feature_graphs import LOADER, Draft, Link
from rig.feature_rows import Row

KOHYA, DIFFUSERS = "kohya.safetensors", "diffusers.safetensors"
BYPASS = ("comfy_extras/nodes_lora_debug.py", "class LoraLoaderBypassModelOnly")


def hook(draft: Draft, name: str = KOHYA, strength: float = 1.0) -> Link:
    """Make a group of hooks with one LoRA."""
    return draft.add("CreateHookLora", lora_name=name, strength_model=strength, strength_clip=0.0)


def hooked(draft: Draft, prompt: Link, hooks: Link, **inputs: object) -> Link:
    """Put a group of hooks on a prompt."""
    values = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks, **inputs}
    return draft.add("ConditioningSetProperties", cond_NEW=prompt, **values)


def on_positive(draft: Draft) -> None:
    draft.set(positive=hooked(draft, draft.sampler["positive"], hook(draft)))


def on_positive_with_cfg(draft: Draft) -> None:
    """The weights change twice in every step."""
    on_positive(draft)
    draft.set(cfg=3.0)


def two_loras(draft: Draft) -> None:
    on_positive(draft)
    other = hook(draft, DIFFUSERS, -0.7)
    draft.set(cfg=3.0, negative=hooked(draft, draft.sampler["negative"], other))


def keyframes(draft: Draft) -> None:
    first = draft.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    values = {"strength_mult": 0.3, "start_percent": 0.5, "prev_hook_kf": first}
    both = draft.add("CreateHookKeyframe", **values)
    scheduled = draft.add("SetHookKeyframes", hooks=hook(draft), hook_kf=both)
    draft.set(positive=hooked(draft, draft.sampler["positive"], scheduled), cfg=2.0)


def over_a_lora(draft: Draft) -> None:
    draft.lora(DIFFUSERS, 0.8)
    on_positive_with_cfg(draft)


def default_prompt(draft: Draft) -> None:
    """A hooked prompt in the upper half, another hook's for the rest."""
    values = {"conditioning": draft.sampler["positive"], "width": 128, "height": 64, "x": 0, "y": 0}
    part = draft.add("ConditioningSetArea", **values, strength=1.0)
    part = hooked(draft, part, hook(draft))
    rest = {"cond_DEFAULT": draft.prompt(), "hooks": hook(draft, DIFFUSERS)}
    draft.set(positive=draft.add("ConditioningSetDefaultCombine", cond=part, **rest))


def model_as_lora(draft: Draft) -> None:
    """Half of the way from one model's weights to another's."""
    draft.nodes[LOADER[0]]["inputs"]["unet_name"] = "flux1-schnell.safetensors"
    values = {"ckpt_name": "flux1-dev-fp8.safetensors", "strength_model": 0.5}
    hooks = draft.add("CreateHookModelAsLoraModelOnly", **values)
    draft.set(positive=hooked(draft, draft.sampler["positive"], hooks), cfg=2.0)


def bypass(draft: Draft, name: str = KOHYA, strength: float = 1.0) -> None:
    draft.model("LoraLoaderBypassModelOnly", lora_name=name, strength_model=strength)


def bypass_and_lora(draft: Draft) -> None:
    """Of two bypass LoRAs one after the other ComfyUI keeps the second."""
    bypass(draft, KOHYA, 0.7)
    draft.lora(DIFFUSERS, 0.5)
    bypass(draft, KOHYA, -0.4)


def bypass_and_hook(draft: Draft) -> None:
    bypass(draft, DIFFUSERS)
    on_positive_with_cfg(draft)


ROWS: dict[str, Row] = {
    "LoRA scheduled by hooks": Row(on_positive),
    "LoRA scheduled by hooks, on the positive prompt, cfg 3": Row(on_positive_with_cfg, steps=3),
    "LoRAs scheduled by hooks, another one on the negative prompt": Row(two_loras, steps=3),
    "LoRA scheduled by hooks, keyframes": Row(keyframes, steps=4),
    "LoRA scheduled by hooks, over another LoRA": Row(over_a_lora),
    "CreateHookModelAsLora": Row(model_as_lora),
    "ConditioningSetDefaultCombine with hooks": Row(default_prompt),
    "LoraLoaderBypass": Row(bypass, needs=BYPASS),
    "LoraLoaderBypass, two with a LoRA between": Row(bypass_and_lora, needs=BYPASS),
    "LoraLoaderBypass, with a LoRA scheduled by hooks": Row(bypass_and_hook, needs=BYPASS),
}

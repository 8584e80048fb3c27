"""The graph that every case runs, in ComfyUI's API format, and what its history says.

Runs in: the check's process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_xdit_patch.check.model_file import POOLED_WIDTH, TEXT_WIDTH
from comfy_xdit_patch.errors import CheckError

MODEL_NAME = "xdit-check.safetensors"
NUM_TEXT_TOKENS = 256
MEASURED_SEED = 2
WARM_UP_SEED = 1


def graph(*, size_px: int, num_steps: int, seed: int) -> dict[str, Any]:
    """One image of this many pixels a side: its latent, and when each step was done."""

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    widths = {"width": TEXT_WIDTH, "pooled_width": POOLED_WIDTH}
    return {
        "model": node("UNETLoader", unet_name=MODEL_NAME, weight_dtype="default"),
        "clock": node("XditCheckClock", model=["model", 0]),
        "text": node("XditCheckConditioning", tokens=NUM_TEXT_TOKENS, seed=3, **widths),
        "empty": node("EmptySD3LatentImage", width=size_px, height=size_px, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["clock", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=num_steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="xdit-check"),
        "times": node("XditCheckTimes", samples=["sampler", 0]),
    }


def latent_file(history: dict[str, Any], base_dir: Path) -> Path:
    """Return the file that the graph's latent is in."""
    file: dict[str, str] = history["outputs"]["save"]["latents"][0]
    return base_dir / file["type"] / file["subfolder"] / file["filename"]


def seconds_per_step(history: dict[str, Any]) -> float:
    """Return the time between the first and the last step, for each step between."""
    times_s: list[float] = history["outputs"]["times"]["times_s"]
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1)


def finished(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the history entry of a prompt that succeeded.

    Raises:
        CheckError: it did not; with what the node said.
    """
    status = entry.get("status") or {}
    for kind, message in status.get("messages", ()):
        if kind == "execution_error":
            raise CheckError(
                f"Node {message.get('node_type')} failed: {message.get('exception_type')}: "
                f"{message.get('exception_message')}"
            )
    if status.get("status_str") != "success":
        raise CheckError(f"The prompt did not succeed: {status}")
    return entry

"""Compare two images, and draw them beside each other with their difference.

Runs in: the rig's environment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rig.environment import RigError
from rig.outputs import Pixels

MAX_PIXEL_DIFFERENCE = 2  # of 255
MIN_PSNR_DB = 70.0
CAPTION_PX = 28
GAP_PX = 8
AMPLIFY = 64


@dataclass(frozen=True)
class Difference:
    """How far an image is from the reference image, on the scale 0 to 255."""

    max_pixel: int
    psnr_db: float

    @property
    def is_equal(self) -> bool:
        """Whether this is rounding: the bound was set where every known bug is far outside."""
        return self.max_pixel <= MAX_PIXEL_DIFFERENCE and self.psnr_db >= MIN_PSNR_DB

    def __str__(self) -> str:
        return f"max {self.max_pixel}/255, PSNR {self.psnr_db:.1f} dB"


def compare(reference: Pixels, other: Pixels) -> Difference:
    """Return the difference of two images of the same size."""
    if reference.shape != other.shape:
        raise RigError(f"image sizes differ: {reference.shape} and {other.shape}.")
    distance = reference.astype(np.int64) - other.astype(np.int64)
    mean_square = float(np.mean(distance**2))
    psnr = math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)
    return Difference(max_pixel=int(np.abs(distance).max()), psnr_db=psnr)


def compare_all(references: list[Pixels], others: list[Pixels]) -> Difference:
    """Return the worst difference over the images of two runs of one graph."""
    if len(references) != len(others):
        raise RigError(f"numbers of images differ: {len(references)} and {len(others)}.")
    each = [compare(a, b) for a, b in zip(references, others, strict=True)]
    return Difference(max(d.max_pixel for d in each), min(d.psnr_db for d in each))


def draw_side_by_side(panels: list[tuple[str, Pixels]], path: Path) -> None:
    """Write the panels beside each other, each under its caption."""
    height = max(pixels.shape[0] for _, pixels in panels)
    width = sum(pixels.shape[1] + GAP_PX for _, pixels in panels) - GAP_PX
    canvas = Image.new("RGB", (width, height + CAPTION_PX), "white")
    draw = ImageDraw.Draw(canvas)
    left = 0
    for caption, pixels in panels:
        draw.text((left + 4, 8), caption, fill="black")
        canvas.paste(Image.fromarray(pixels), (left, CAPTION_PX))
        left += pixels.shape[1] + GAP_PX
    canvas.save(path)


def amplified_difference(reference: Pixels, other: Pixels) -> Pixels:
    """Return the absolute difference, amplified so that one level of 255 is visible."""
    distance = np.abs(reference.astype(np.int64) - other.astype(np.int64)) * AMPLIFY
    amplified: Pixels = np.clip(distance, 0, 255).astype(np.uint8)
    return amplified

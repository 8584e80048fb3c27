"""Read what a finished prompt has written: images and latents.

Runs in: the rig's environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.numpy import load_file

from rig.environment import RigError

Pixels = npt.NDArray[np.uint8]
Latent = npt.NDArray[np.float32]


class Outputs:
    """Find output files of a history entry below ``base_dir``."""

    base_dir: Path

    def images(self, history: dict[str, Any]) -> list[Pixels]:
        """Return every saved image, height x width x 3, in the order of nodes and batch."""
        files = self.output_files(history, "images")
        return [np.asarray(Image.open(path).convert("RGB")) for path in files]

    def latents(self, history: dict[str, Any]) -> list[Latent]:
        """Return the tensor of every SaveLatent node."""
        files = self.output_files(history, "latents")
        return [np.asarray(load_file(path)["latent_tensor"], np.float32) for path in files]

    def output_files(self, history: dict[str, Any], kind: str) -> list[Path]:
        """Return the paths of a kind of output; there must be one at least."""
        files = [
            self.base_dir / item["type"] / item["subfolder"] / item["filename"]
            for _, output in sorted(history["outputs"].items())
            for item in output.get(kind, [])
        ]
        if not files:
            raise RigError(f"the prompt wrote no {kind}; outputs are {history['outputs']}.")
        return files

"""What became of one call that was computed.

Runs in: host process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comfy_xdit_patch.patching.auto import Kind


@dataclass(frozen=True, slots=True)
class Step:
    """A call that is computed.

    ``gathered_for`` is why a part of it ran here; ``is_empty`` says that no block ran on the
    workers: a node left them out, or computed them itself. ``is_one``: it ran here, to be timed.
    """

    out: torch.Tensor
    gathered_for: str | None = None
    is_empty: bool = False
    is_one: bool = False
    kind: Kind | None = None
    """Set if the time of the step tells ``auto`` something."""

"""What is known of one sampling run.

Runs in: host process.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.observability.status import RunCounts
from comfy_xdit_patch.patching.compared import Compared
from comfy_xdit_patch.patching.models import KnownModel
from comfy_xdit_patch.patching.streams import Streams
from comfy_xdit_patch.transport.fingerprint import prescribed_attention


@dataclass(slots=True)
class Run:
    """One sampling run. A refusal of scope RUN holds until its end."""

    is_flux: bool = False
    num_calls: int = 0
    counts: RunCounts = field(default_factory=RunCounts)
    refusal: Refusal | None = None
    in_use: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """The model that is sampled, and those that the workers run for it."""
    models: dict[int, KnownModel] = field(default_factory=dict)
    """Models of this run as the workers know them, by the identity of their BaseModel."""
    changes: dict[int, list[Refusal]] = field(default_factory=dict)
    """What others hung on single modules of them."""
    code: dict[int, tuple[Compared, list[Refusal]]] = field(default_factory=dict)
    """What their code reaches, and what is different in classes without a name; ``likeness.py``."""
    code_generation: int = 0
    """Of the workers that said so."""
    objects: dict[int, tuple[Any, int]] = field(default_factory=dict)
    """Objects of nodes that keep state, with their numbers for the workers."""
    prescribed: dict[int, bool] = field(default_factory=dict)
    """Whether checkpoints prescribe an attention function, by the identity of the module."""
    tensor: dict[tuple[int, int], Refusal | None] = field(default_factory=dict)
    """Why their weights cannot be cut into so many parts."""
    needs_residuals: bool = False
    """Steps of this run are computed here in part or in whole, and so need ControlNets here."""
    bypass: dict[int, dict[str, list[Any]]] = field(default_factory=dict)
    """ComfyUI's bypass hooks on them."""
    is_around: bool = False
    """A call of a model's ``forward`` is being computed, with its blocks on the workers."""
    compared: set[tuple[int, str, str]] = field(default_factory=set)
    """What was compared with the workers' weights in this run."""
    generation: int = 0
    is_balanced: bool = False
    """Its first call was made, and shares follow what others use of the devices."""
    weights: tuple[int, ...] | None = None
    """Those that this run keeps, if it must keep them."""
    streams: Streams = field(default_factory=Streams)
    """PipeFusion's: which of the calls are exact."""

    def is_prescribed(self, module: Any) -> bool:
        """Whether a checkpoint prescribes an attention function for this model or ControlNet."""
        if id(module) not in self.prescribed:  # All modules are looked at: not in every step.
            self.prescribed[id(module)] = bool(prescribed_attention(module))
        return self.prescribed[id(module)]

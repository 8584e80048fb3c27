"""One call of a FLUX model or of a ControlNet, as it was read: once, for all that decide about it.

Runs in: host process. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.reading.compiled import compiled_blocks
from comfy_xdit_patch.host.reading.eligibility import blocking
from comfy_xdit_patch.host.reading.node_patches import CarriedPatches
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.planning.plan import Workload
from comfy_xdit_patch.planning.workload import CARRIED_ARGUMENTS, workload_of
from comfy_xdit_patch.wire.messages.requests import Tree


def _comfyuis_poll() -> Callable[[], None]:
    import comfy.model_management

    poll: Callable[[], None] = comfy.model_management.throw_exception_if_processing_interrupted
    return poll


@dataclass(eq=False)
class Call:
    """One call. ``changes`` grows while it is read; what is cached is asked for after that."""

    module: Any
    """ComfyUI's ``Flux``, or ``ControlNetFlux``."""
    model: Any
    """ComfyUI's ``BaseModel`` around the module, or a ``ControlModel``."""
    arguments: Mapping[str, Any]
    """Of the module's ``_forward``, or of a ControlNet's ``forward``, by name."""
    run: Run
    carried: CarriedPatches = field(default_factory=CarriedPatches)
    """What nodes put into ``transformer_options``, for the workers."""
    changes: list[Refusal] = field(default_factory=list)
    """What keeps the workers from running all of it: then its blocks run there, or nothing does."""
    is_inner: bool = False
    """A call of ``forward`` lies around this one, and its blocks run on the workers already: all of
    it does, or nothing is done here."""
    names: Sequence[str] = CARRIED_ARGUMENTS
    """Of the arguments that the workers are given."""
    poll: Callable[[], None] = field(default_factory=_comfyuis_poll)
    """Raises ComfyUI's ``InterruptProcessingException`` once the user has cancelled."""

    @property
    def options(self) -> Mapping[str, Any]:
        """``transformer_options``."""
        return self.arguments.get("transformer_options") or {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the latent."""
        dtype: torch.dtype = self.arguments["x"].dtype
        return dtype

    @property
    def refusal(self) -> Refusal | None:
        """The first change that keeps even the blocks from running on the workers."""
        return next(iter(self.changes), None) if self.is_inner else blocking(self.changes)

    @property
    def has_node_code(self) -> bool:
        """Whether a node's code takes part, here or on the workers."""
        return bool(self.changes) or self.carried.tree is not None

    @cached_property
    def compiled(self) -> Tree | Refusal:
        """Which blocks the user has compiled, and how; None for none."""
        found = compiled_blocks(self.model)
        if found is not None and self.changes:
            return Refusal("a node's code runs around the blocks")
        return found

    @cached_property
    def workload(self) -> Workload:
        """Tokens, heads and rows; a node's code may look at all rows, which are not shared then."""
        workload = workload_of(self.module, self.arguments, names=self.names)
        return replace(workload, is_batch_divisible=False) if self.has_node_code else workload

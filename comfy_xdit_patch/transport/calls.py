"""What the host asks of the ranks while a model is called.

Runs in: host and worker. No torch. See ``messages.py`` for the other messages and the encoding.
``grid`` and ``weights`` are those of the call's ``ParallelPlan``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Tree: TypeAlias = Any
"""None, bool, int, float, str, list, dict with string keys, or a ``SlotRef`` as a dict."""


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of the diffusion model.

    ``arguments`` is the tree of ``Flux._forward``'s keyword arguments; ``control`` in it
    holds recipes for residuals (``engine/residuals.py``), ``patches`` are those of nodes
    (``engine/patches.py``). The ranks that own a part
    of the batch write it to the slot ``result``. ``pipeline`` is None but for PipeFusion
    (``engine/pipelined_sequence.py``). ``working_bytes`` is what the call takes on a device beside
    the weights, for a look whether there is room; 0 to make it at once.
    """

    request: int
    model: int
    grid: list[int]
    weights: list[int]
    arguments: Tree
    result: int
    pipeline: Tree = None
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Control:
    """One call of a ControlNet, whose residuals stay with the ranks under the number ``call``.

    ``working_bytes`` as in ``Forward``.
    """

    request: int
    model: int
    call: int
    grid: list[int]
    weights: list[int]
    arguments: Tree
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunBlock:
    """One block of a forward that runs in the host.

    ``counts`` are text, image and reference tokens of all ranks. ``arguments`` are those of the
    block's ``forward``; tokens among them are whole, or recipes of what the ranks keep
    (``engine/driven.py``). The ranks keep what it returns under the numbers ``keep``. The first one
    of a step has ``working_bytes``, as in ``Forward``.
    """

    request: int
    model: int
    block: str
    grid: list[int]
    weights: list[int]
    counts: list[int]
    arguments: Tree
    patches: Tree
    keep: list[int]
    is_first: bool
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fetch:
    """Write all tokens of a recipe to the slot ``result``, in ComfyUI's order."""

    request: int
    model: int
    grid: list[int]
    weights: list[int]
    tokens: Tree
    stream: str
    counts: list[int]
    result: int


@dataclass(frozen=True, slots=True)
class Free:
    """Give back the memory of keys and values that PipeFusion kept for these ``streams``."""

    request: int
    streams: list[int]


@dataclass(frozen=True, slots=True)
class Forget:
    """What the host does not refer to any more.

    ``calls`` of ControlNets, whose residuals the ranks keep; ``objects`` of nodes' patches;
    ``tokens`` between blocks.
    """

    calls: list[int]
    objects: list[int]
    tokens: list[int]

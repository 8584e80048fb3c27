"""``torch.compile`` of a model's blocks, where the user's graph asks for it.

Runs in: worker process.

A block is compiled as ComfyUI wrote it, and in one piece: the attention in it is one operator of
ours, which ComfyUI's attention function, our exchange and whatever a node put there lie behind. So
nothing that changes from step to step is guarded on: the operator finds the options of the call
where the block left them. Blocks of one class share what is compiled, for weights are arguments of
it; new weights are seen, and compile nothing. What ranks share of a block's weights and gather for
it enters as tensors too.

Ranks compile apart from each other: their shards differ in length. A rank that cannot, computes as
if nobody had asked. Because a block is one graph or none (``fullgraph``), whatever fails in Dynamo
or behind it fails before the block has run, so no exchange is made twice.

Inductor's CUDA graphs are left out: a rank has its own (``captured_forwards.py``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.worker.attention.prescribed import ARGUMENT as PRESCRIBED

ATTENTION, OPTIONS = "optimized_attention", "transformer_options"
"""What ComfyUI's blocks call, and their argument that it reads."""
NUM_SHAPES = 64
"""Graphs that torch keeps of one block's code; its own limit of 8 is soon reached with models,
batches and sizes that change."""


@dataclass(slots=True)
class _Running:
    """What compiled code finds outside of itself, and what is counted. A rank computes one call."""

    attention: Callable[..., torch.Tensor] | None = None
    options: Any = None
    num_compiled: int = 0
    num_graphs: int = 0
    num_moves: int = 0
    failed: str = ""


_running = _Running()
entering: list[torch.Tensor] = []
"""What the block that runs is given beside its arguments. Here and not on the block, since torch
takes the shapes of what a module holds for fixed."""
log = logging.getLogger(__name__)


def num_moves() -> int:
    """How often this process has begun or ended to compile something."""
    return _running.num_moves


@torch.library.custom_op(
    "comfy_xdit::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int heads, Tensor? mask) -> Tensor",
)
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None
) -> torch.Tensor:
    assert _running.attention is not None
    _running.num_compiled += 1
    options = {OPTIONS: _running.options}
    out = _running.attention(q, k, v, heads, mask=mask, skip_reshape=True, **options)
    return out.contiguous()


@_attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


def _opaque(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Stand for ComfyUI's attention function in its FLUX code; one function, so guards hold."""
    if getattr(options.get(PRESCRIBED), "function", None) is None:
        options.pop(PRESCRIBED, None)
    if options.keys() != {"skip_reshape", OPTIONS}:
        raise NotImplementedError("attention is given more than tensors and options of the call")
    out: torch.Tensor = torch.ops.comfy_xdit.attention(q, k, v, heads, mask)
    return out


@dataclass(frozen=True)
class _Backend:
    """A backend of Dynamo's that counts. Equal ones share what they have compiled."""

    name: str
    options: str
    """Of inductor, as JSON."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        _running.num_graphs += 1
        _running.num_moves += 1
        try:
            if self.name != "inductor":
                return torch._dynamo.lookup_backend(self.name)(graph, inputs)
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs, config_patches=json.loads(self.options))
        finally:
            _running.num_moves += 1


@dataclass(slots=True)
class Outcome:
    """What became of the blocks of one call that were to run compiled."""

    num_compiled: int = 0
    num_graphs: int = 0
    """That were compiled in this call."""
    reason: str = ""
    """Why blocks ran as they are."""


@dataclass(slots=True)
class CompiledBlocks:
    """The compiled blocks of one model."""

    _asked: Tree = None
    _forwards: dict[str, Callable[..., Any]] = field(default_factory=dict)
    _failed: str = ""

    @contextmanager
    def of(
        self,
        flux: Any,
        asked: Tree,
        obstacle: Refusal | None,
        enter: Callable[[str, torch.Tensor], list[torch.Tensor]] | None = None,
    ) -> Iterator[Outcome]:
        """Have a model's blocks run compiled for one call, if that is asked for.

        Args:
            asked: as ``host/reading/compiled.py`` makes it.
            obstacle: what keeps them from it.
            enter: returns what enters a block, by its name and its ``vec``. Collective.

        Yields:
            What became of it, once the call has ended.
        """
        outcome = Outcome()
        if asked is None:
            yield outcome
            return
        if obstacle is None:
            obstacle = self._prepare(flux, asked)
        if obstacle is not None:
            outcome.reason = obstacle.reason
            yield outcome
            return
        import comfy.ldm.flux.math as module

        before = _running.num_compiled, _running.num_graphs
        _running.failed, num_run = "", 0

        def run(name: str, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal num_run
            num_run += 1
            if OPTIONS not in kwargs:
                _running.failed = "a block is not given its options by name"
            if _running.failed:
                return whole(*args, **kwargs)
            # What lies there now: a checkpoint's attention may, for this call.
            _running.attention, _running.options = getattr(module, ATTENTION), kwargs[OPTIONS]
            if enter is not None:
                entering[:] = enter(name, kwargs["vec"])
            num_begun = _running.num_compiled
            try:
                with own_attribute(module, ATTENTION, _opaque):
                    return self._forwards[name](*args, **kwargs)
            except Exception as error:
                if _running.num_compiled > num_begun:
                    raise  # The block has run, and other ranks with it.
                log.warning("%s is not compiled", name, exc_info=error)
                _running.failed = _cause_of(error)
            return whole(*args, **kwargs)

        with ExitStack() as stack:
            for name in self._forwards:
                block = flux.get_submodule(name)
                forward = partial(run, name, block.forward)
                stack.enter_context(own_attribute(block, "forward", forward))
            try:
                yield outcome
            finally:
                _running.attention = _running.options = None
                entering.clear()
        outcome.num_compiled = _running.num_compiled - before[0]
        outcome.num_graphs = _running.num_graphs - before[1]
        if _running.failed:
            left = num_run - outcome.num_compiled
            outcome.reason = Refusal(
                f"torch did not compile {left} of {num_run}: {_running.failed}"
            ).reason
            self._failed = outcome.reason  # It would fail again, and take as long.

    @property
    def is_in_use(self) -> bool:
        """Whether anything may be compiled for this model."""
        return bool(self._forwards)

    def _prepare(self, flux: Any, asked: Tree) -> Refusal | None:
        """Compile nothing yet: torch does when a block first runs."""
        import torch._dynamo
        import torch._inductor.config

        if not getattr(torch._dynamo.config, "inline_inbuilt_nn_modules", False):
            return Refusal("torch before 2.5 compiles every block anew")
        if asked != self._asked:
            self._asked, self._failed = asked, ""
            torch._dynamo.config.cache_size_limit = NUM_SHAPES  # its name in every version
            backend = _Backend(asked["backend"], json.dumps(asked["options"], sort_keys=True))
            wanted = asked["blocks"]
            self._forwards = {
                name: torch.compile(
                    block.forward, backend=backend, dynamic=asked["dynamic"], fullgraph=True
                )
                for name, block in _blocks(flux)
                if wanted is None or name in wanted
            }
        return Refusal(self._failed) if self._failed else None


def _cause_of(error: BaseException) -> str:
    """Name the exception that Dynamo's are around, in one line."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _blocks(flux: Any) -> Iterator[tuple[str, Any]]:
    for name in BLOCK_LISTS:
        for number, block in enumerate(getattr(flux, name)):
            yield f"{name}.{number}", block

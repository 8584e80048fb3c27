"""CUDA graphs on emulated cards: kernels that are captured have no effect until they are replayed.

Runs in: every process of a rig server with emulated cards.

As on cards:
- a captured kernel reads and writes the very memory that it was captured with, so whatever is to
  differ from replay to replay has to be written there; a replay runs no Python of the model;
- what a captured kernel returns is garbage (here NaN, or zero) until the first replay;
- the host may read nothing, wait for nothing and send nothing from pageable memory meanwhile: that
  is an error, and what was captured so far is lost with it;
- an exchange that was begun in a graph ends in it.

``EMULATED_NO_CAPTURE=1`` names a card that captures no exchange.

Memory of captured results is kept for as long as the graph, all of it; a card's allocator would use
it again within the graph.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import emulated_allocator as allocator
import torch
from torch.utils._pytree import tree_leaves

INVALID = "CUDA error: operation failed due to a previous error during capture"
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
ENDED = "CUDA error: the graph has been reset"
CARD_FACTOR = 10
"""A card computes for longer than a graph's launch takes; here it is the launch that computes."""
_current = threading.local()
_ahead_s = 0.0
_pools = itertools.count(1)


class CUDAGraph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._steps: list[Callable[[], object]] | None = None
        self._is_invalid = False
        self._num_unjoined = 0
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if capturing() is not None:
            raise RuntimeError(NOT_PERMITTED)
        self._pool = pool or graph_pool_handle()
        self._steps = []
        _current.graph = self

    def capture_end(self) -> None:
        _current.graph = None
        if self._is_invalid or self._num_unjoined:
            self._steps = None
            raise RuntimeError(INVALID if self._is_invalid else f"{INVALID}: unjoined work")

    def replay(self) -> None:
        if self._steps is None:
            raise RuntimeError(ENDED)
        start_s = time.perf_counter()
        for step in self._steps:
            step()
        global _ahead_s
        _ahead_s += CARD_FACTOR * (time.perf_counter() - start_s)

    def reset(self) -> None:
        self._steps = None

    def pool(self) -> Any:
        return self._pool

    def add(self, step: Callable[[], object]) -> None:
        """Have a replay do this, after what was added before."""
        assert self._steps is not None
        self._steps.append(step)

    def invalidate(self) -> None:
        self._is_invalid = True

    def kernel(self, run: Callable[..., Any], args: Any, kwargs: Any, written: Any) -> Any:
        """Capture a kernel that writes some of its arguments; return its results, without contents.

        It does run, so that its results have their shapes, and what it wrote is undone.
        """
        given = {_memory(tensor) for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        before = [(tensor, tensor.clone()) for tensor in tree_leaves(written)]
        out = run(*args, **kwargs)
        for tensor, contents in before:
            tensor.copy_(contents)
        results = [t if _is_new(t, given) else None for t in tree_leaves(out)]
        for result in results:
            if result is not None:
                _spoil(result)

        def replayed() -> None:
            for result, now in zip(results, tree_leaves(run(*args, **kwargs)), strict=True):
                if result is not None:
                    result.copy_(now)

        self.add(replayed)
        return out

    def exchange(self, run: Callable[[], Any], num_works: int) -> list[_Captured]:
        """Capture an exchange; return works that are to be waited for."""
        card = allocator.card_of(torch.cuda.current_device())
        if str(card.number) == os.environ.get("EMULATED_NO_CAPTURE"):
            forbid("this card captures no exchange")
        begun: list[Any] = []

        def begin() -> None:
            works = run()
            begun[:] = works if isinstance(works, list) else [works]

        self.add(begin)
        self._num_unjoined += num_works
        return [_Captured(self, begun, number) for number in range(num_works)]

    def join(self, step: Callable[[], object]) -> None:
        self._num_unjoined -= 1
        self.add(step)


class _Captured:
    """Work of an exchange in a graph."""

    def __init__(self, graph: CUDAGraph, begun: list[Any], number: int) -> None:
        self._graph, self._begun, self._number = graph, begun, number

    def wait(self) -> bool:
        self._graph.join(lambda: self._begun[self._number].wait())
        return True


def now_s() -> float:
    """The time on the cards."""
    return time.perf_counter() + _ahead_s


def capturing() -> Any:
    """The graph that this thread captures; None for none."""
    return getattr(_current, "graph", None)


def graph_pool_handle() -> tuple[int, int]:
    return 0, next(_pools)


def forbid(what: str) -> None:
    """Fail where a stream that is captured could not do this.

    Raises:
        RuntimeError: this thread captures a graph, which is lost by it.
    """
    graph = capturing()
    if graph is not None:
        graph.invalidate()
        raise RuntimeError(f"{NOT_PERMITTED}\n{what}")


def launch(
    run: Callable[..., Any], args: Any, kwargs: Any, written: Iterable[torch.Tensor] = ()
) -> Any:
    """Launch a kernel on tensors of the CPU, or capture it."""
    graph = capturing()
    if graph is None:
        return run(*args, **kwargs)
    return graph.kernel(run, args, kwargs, list(written))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_new(value: Any, given: set[int]) -> bool:
    return _is_tensor(value) and _memory(value) not in given


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _spoil(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

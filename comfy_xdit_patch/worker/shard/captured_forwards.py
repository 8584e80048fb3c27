"""CUDA graphs of a rank's forwards, where the user asks for them (``XDIT_CUDA_GRAPHS``).

Runs in: worker process.

A forward asks torch for thousands of kernels, one by one. Captured, it is one launch: ComfyUI's own
code and our exchanges run once without effect, and a replay launches the same kernels on the same
memory, without any Python. All of a rank's share is one graph, for between the arguments that the
host sent and the rows that it is sent nothing is asked of the host; sizes are known from the plan.

    call 1 of a kind    as ever, which warms up
    call 2              as ever; captured, replayed once, and compared bit for bit
    from then on        arguments are copied to where the graph reads them, and it is replayed

NCCL wants a graph with an exchange in it to be captured by all ranks, and launched by all of them.
So before a rank goes its way the ranks agree on what all of them can do: once for a kind of call,
and again after whatever could have changed what one of them has. What they agreed on changes alike
on all of them otherwise.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.wire.tensors import take_apart
from comfy_xdit_patch.worker.ranks import collectives

NUM_KEPT = 8
"""Kinds of calls: models, sizes, batches and shares that change. Their graphs share one pool."""

Places = tuple[int, ...]
"""Where the weights lie, in the order of the model."""
Share = tuple[torch.Tensor, int]
"""Rows, and the bytes that this rank sent to others."""
log = logging.getLogger(__name__)


class Stage(IntEnum):
    """How far a kind of call is, the least first: that is what all ranks can do."""

    NEVER, NEW, SEEN, CAPTURED = range(4)


@dataclass(slots=True)
class _Graph:
    graph: Any
    inputs: list[torch.Tensor]
    rows: torch.Tensor
    bytes_sent: int
    exchanges: collectives.Captured
    read: list[torch.Tensor]

    def replay(self, tensors: list[torch.Tensor]) -> Share:
        for place, tensor in zip(self.inputs, tensors, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        collectives.replayed(self.exchanges)
        return self.rows, self.bytes_sent

    def reset(self) -> None:
        with warnings.catch_warnings():
            # The allocator warns of what ends here after all; ComfyUI's graphs do likewise.
            warnings.simplefilter("ignore")
            self.graph.reset()


class _Read(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what kernels are given, but for what was made since: a graph knows addresses only."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[int] = set()
        self._kept: dict[int, torch.Tensor] = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self._kept.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(_storages((args, kwargs)))
        self._kept.update((key, t) for key, t in given.items() if key not in self._made)
        out = func(*args, **(kwargs or {}))
        self._made.update(key for key, _ in _storages(out) if key not in self._kept)
        return out


@dataclass(slots=True)
class _Kind:
    """One kind of call. ``agreed`` is what all ranks can do, None until they look again."""

    graph: _Graph | None = None
    places: Places | None = None
    is_seen: bool = False
    agreed: Stage | None = None

    def forget(self) -> None:
        if self.graph is not None:
            self.graph.reset()
        self.graph = None


@dataclass(slots=True)
class Outcome:
    """What became of a call. ``reason`` is why this rank captures no call of the kind."""

    rows: torch.Tensor
    bytes_sent: int
    is_replayed: bool = False
    has_captured: bool = False
    reason: str = ""


class CapturedForwards:
    """The graphs of one rank, of all models that it holds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kinds: dict[Hashable, _Kind] = {}  # the one used last is last
        self._failed: dict[int, str] = {}
        self._pool: Any = None
        self._stream: Any = None

    def compute(
        self,
        compute: Callable[[Any], Share],
        arguments: Any,
        *,
        model: int,
        how: Hashable,
        places: Callable[[], Places | None],
    ) -> Outcome:
        """Compute a call, by a graph if all ranks have it.

        Args:
            compute: computes the rank's share of a call with some arguments.
            arguments: a tree with tensors of the device in it.
            model: its number.
            how: what ``compute`` depends on beside them.
            places: looks where the weights lie; None if one of them is not on the device.

        Collective:
            Every rank of the world, for the same call.
        """
        tensors: list[torch.Tensor] = []

        def taken(tensor: torch.Tensor) -> tuple[Any, ...]:
            tensors.append(tensor)
            return tuple(tensor.shape), tensor.dtype

        key = model, how, repr(tree_map_only(torch.Tensor, taken, arguments))
        kind = self._kind(key)
        if kind.agreed is None:
            self._agree(kind, places(), can=model not in self._failed)
        if kind.agreed is Stage.CAPTURED:
            assert kind.graph is not None
            return Outcome(*kind.graph.replay(tensors), is_replayed=True)
        outcome = Outcome(*compute(arguments))
        if kind.agreed is Stage.NEW:
            kind.is_seen, kind.agreed = True, Stage.SEEN
        elif kind.agreed is Stage.SEEN:
            self._capture(kind, model, compute, arguments, tensors, outcome)
        if kind.agreed is Stage.NEVER:
            lying = Refusal("not all weights lie on the card") if kind.places is None else None
            outcome.reason = self._failed.get(model, lying.reason if lying else "")
        return outcome

    def look_again(self) -> None:
        """Have the ranks agree anew: one of them may have lost what it had."""
        for kind in self._kinds.values():
            kind.agreed = None

    def drop(self) -> None:
        """Free all graphs, and their memory."""
        for kind in self._kinds.values():
            kind.forget()
        self._kinds.clear()
        self._failed.clear()
        self._pool = None

    def _kind(self, key: Hashable) -> _Kind:
        kind = self._kinds[key] = self._kinds.pop(key) if key in self._kinds else _Kind()
        # Those that ranks have agreed on were used last, by all of them in the same order.
        for old in list(islice(self._kinds, max(0, len(self._kinds) - NUM_KEPT))):
            self._kinds.pop(old).forget()
        return kind

    def _agree(self, kind: _Kind, places: Places | None, *, can: bool) -> None:
        if kind.places != places:
            kind.forget()
            kind.places = places
        stage = Stage.CAPTURED if kind.graph is not None else Stage(Stage.NEW + kind.is_seen)
        kind.agreed = self._least(stage if can and places is not None else Stage.NEVER)
        if kind.agreed is not Stage.CAPTURED:
            kind.forget()  # Every graph is to be of the same capture as those of other ranks.

    def _least(self, stage: Stage) -> Stage:
        """Return the least that a rank can do. Collective."""
        value = torch.tensor(float(-stage)).to(self._device)
        collectives.all_reduce_max(value)
        return Stage(-int(value.item()))

    def _capture(
        self,
        kind: _Kind,
        model: int,
        compute: Callable[[Any], Share],
        arguments: Any,
        tensors: list[torch.Tensor],
        outcome: Outcome,
    ) -> None:
        """Capture a call that was just computed, and see on all ranks that it gives the same."""
        failed = ""
        try:
            kind.graph = self._captured(compute, arguments, tensors)
        except Exception as error:  # whatever torch, ComfyUI or one of their kernels says
            log.warning("a forward is not captured", exc_info=error)
            self._pool = None  # The allocator may still hold what failed for it.
            failed = Refusal(f"torch did not capture the forward: {_cause_of(error)}").reason
        if self._least(Stage.NEVER if failed else Stage.CAPTURED) is Stage.CAPTURED:
            assert kind.graph is not None
            rows, _ = kind.graph.replay(tensors)
            if not torch.equal(_bits(rows), _bits(outcome.rows)):
                failed = Refusal("a replay of the captured forward gives other bits").reason
            kind.agreed = self._least(Stage.NEVER if failed else Stage.CAPTURED)
        else:
            kind.agreed = Stage.NEVER
        outcome.has_captured = kind.agreed is Stage.CAPTURED
        if not outcome.has_captured:
            kind.forget()
            self._failed[model] = failed

    def _captured(
        self, compute: Callable[[Any], Share], arguments: Any, tensors: list[torch.Tensor]
    ) -> _Graph:
        inputs = [tensor.clone() for tensor in tensors]
        places: Iterator[torch.Tensor] = iter(inputs)
        given = tree_map_only(torch.Tensor, lambda _: next(places), arguments)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        with (
            # Where a capture fails, torch leaves its stream as the current one.
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            collectives.capturing() as exchanges,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
            _Read() as read,
        ):
            rows, bytes_sent = compute(given)
        return _Graph(graph, inputs, rows, bytes_sent, exchanges, read.tensors)


def places_of(flux: Any, device: torch.device) -> Places | None:
    """Look where the weights of a model lie; None if one of them is not on a device."""
    found = []
    for tensor in (*flux.parameters(), *flux.buffers()):
        if tensor.device != device:
            return None
        found += [part.data_ptr() for part in take_apart(tensor)[0].values()]
    return tuple(found)


def _cause_of(error: BaseException) -> str:
    """Name what went wrong first, in one line: to end a capture that failed fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _storages(tree: Any) -> Iterator[tuple[int, torch.Tensor]]:
    for value in tree_leaves(tree):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()._cdata, value


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes and not values: a NaN is itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.uint8)

"""Process groups as NCCL's: gloo exchanges what the cards' tensors are.

Runs in: every process of a rig server with emulated cards.

As on cards, a communicator takes memory at its first exchange, and what was begun and not waited
for runs on a stream of its own: until then nobody may read what it writes, or write what it reads.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterable
from typing import Any

import emulated_allocator as allocator
import emulated_graphs as graphs
import emulated_streams as streams
import emulated_tensors as tensors
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

OUT_FIRST = ("all_gather_into_tensor", "all_to_all_single")
"""These take what they write before what they read."""
EXCHANGES = (*OUT_FIRST, "all_gather", "all_reduce", "batch_isend_irecv", "isend", "irecv")
_current = threading.local()


class Begun:
    """Work that the stream has not waited for."""

    def __init__(
        self, work: Any, read: Iterable[torch.Tensor], written: Iterable[torch.Tensor]
    ) -> None:
        self._work = work
        self._in_flight = [
            streams.InFlight(tensor, is_written=is_written)
            for of_kind, is_written in ((read, False), (written, True))
            for tensor in of_kind
        ]

    def wait(self, *args: Any) -> Any:
        done = self._work.wait(*args)
        while self._in_flight:
            self._in_flight.pop().has_landed()
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def install() -> None:
    """Have ``torch.distributed`` of this process exchange tensors of cards."""
    begin, new_group, destroy = dist.init_process_group, dist.new_group, dist.destroy_process_group

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        return begin("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def group(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return new_group(*args, **kwargs)

    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        destroy(*args, **kwargs)
        allocator.leave_groups()

    for module in (dist, c10d):
        module.init_process_group, module.new_group = init_process_group, group  # type: ignore[attr-defined]
        module.destroy_process_group = destroy_process_group  # type: ignore[attr-defined]
    for name in EXCHANGES:
        exchange = _on_cards(getattr(dist, name))
        setattr(dist, name, exchange)
        setattr(c10d, name, exchange)


def _on_cards(exchange: Any) -> Any:
    """Count the communicator of an exchange, and watch over what it leaves to be waited for.

    Sends of two ranks alone, outside of a batch, have a communicator of their own.
    """
    name = exchange.__name__
    is_pair = name in ("isend", "irecv")

    @functools.wraps(exchange)
    def exchanged(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        operations = values.get("p2p_op_list")
        is_inner = getattr(_current, "is_batch", False)
        first = operations[0].tensor if operations else next(iter(values.values()))
        first = first[0] if isinstance(first, list) else first
        if isinstance(first, tensors.Emulated) and not is_inner:
            group = operations[0].group if operations else values.get("group")
            other = next((values[n] for n in ("dst", "src") if n in values), None)
            me = dist.get_rank()
            key = id(group or dist.group.WORLD), (min(me, other), max(me, other)) if is_pair else 0
            allocator.join_group(first.where.index, key)

        def run() -> Any:
            _current.is_batch = is_inner or operations is not None
            try:
                return exchange(*args, **kwargs)
            finally:
                _current.is_batch = is_inner

        graph = None if is_inner else graphs.capturing()
        if graph is None or not isinstance(first, tensors.Emulated):
            work = run()
        elif operations:
            work = graph.exchange(run, len(operations))
        else:
            is_async = is_pair or values.get("async_op", False)
            work = next(iter(graph.exchange(run, int(is_async))), None)
        return work if is_inner or work is None else begun(work, values, operations)

    def begun(work: Any, values: dict[str, Any], operations: Any) -> Any:
        if operations:
            is_send = ["isend" in op.op.__name__ for op in operations]
            data = [op.tensor for op in operations]
            return [
                Begun(one, data[n : n + 1] if sends else (), () if sends else data[n : n + 1])
                for n, (one, sends) in enumerate(zip(work, is_send, strict=True))
            ]
        first, *others = (value for value in values.values() if isinstance(value, torch.Tensor))
        if name in OUT_FIRST:
            return Begun(work, others, [first])
        return Begun(work, [first], []) if name == "isend" else Begun(work, [], [first])

    signature = inspect.signature(exchange)
    return exchanged

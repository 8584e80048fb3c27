"""Bodies that count what a forward asks of torch: calls, kernels among them, copies among those.

Runs in: a ComfyUI process of ``process.py``.

Nothing computes (``fake_flux.py``). Calls are ATen operators from Python: what a GPU's CPU thread
works through. A call is a kernel if its result has memory of its own that it fills, or if it
changes what it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from fake_cards import fake_tensors_as_plain
from fake_exchange import Rank, joined
from fake_flux import CARD, DTYPE, FLUX1, MODE, arguments, later_of, model_of
from families import flux
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.transfers import TransferDtype
from comfy_xdit_patch.worker.forward import forward_share
from comfy_xdit_patch.worker.pipefusion.kept_keys import StreamKeys
from comfy_xdit_patch.worker.shard import later_columns
from comfy_xdit_patch.worker.shard.captured_forwards import CapturedForwards, Stage
from comfy_xdit_patch.worker.shard.residuals import Residuals
from comfy_xdit_patch.worker.weights.shared_modulation import WHOLE_FORWARD, SharedModulation

ALLOCATING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
MOVING = {"cat", "stack", "clone", "copy_", "contiguous", "reshape", "index_select", "to"}
"""Operators that compute nothing. All but the first two give a view where they can."""

NOTHING_ELSE: dict[str, Any] = {
    "scaled": {},
    "residuals": Residuals(),
    "patches": None,
    "streams": StreamKeys(),
    "later": None,
}
"""Arguments of ``forward_share`` for a call in which nodes and others have no part."""


class Counter(TorchDispatchMode):
    """Counts calls, kernels and copies while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.so_far = [0, 0, 0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "aten":  # Tensors without data ask for their device this way.
            return out
        name = func.overloadpacket.__name__
        is_kernel = func._schema.is_mutable or not _memory(out) <= _memory((args, kwargs))
        is_kernel = is_kernel and name not in ALLOCATING
        for i, counts in enumerate((True, is_kernel, is_kernel and name in MOVING)):
            self.so_far[i] += counts
        return out


def _memory(tree: Any) -> set[int]:
    tensors = (t for t in tree_iter(tree) if isinstance(t, torch.Tensor))
    return {t.untyped_storage()._cdata for t in tensors}


def calls(
    num_ranks: int,
    *,
    text: int,
    shares_modulation: bool = False,
    overlaps: bool = True,
    transfer_dtype: TransferDtype = "exact",
) -> dict[str, list[int]]:
    """Count a forward by ulysses on the first of so many ranks.

    One rank has no plan of ours: that is ComfyUI's own forward.

    Args:
        shares_modulation: each rank has a part of what modulates the blocks. It is asked for all of
            them in the first block.
        overlaps: the rank computes while tokens are exchanged.
        transfer_dtype: in which form heads travel.

    Returns:
        Calls, kernels, copies and exchanges of one ``double`` block, of one ``single`` block, and
        of everything ``outside`` of both.
    """
    counts = {"double": [0] * 4, "single": [0] * 4}
    plan = ParallelPlan(ulysses=num_ranks)
    # A weight without data is multiplied as one with data would be.
    plain = mock.patch.object(later_columns, "PLAIN", (*later_columns.PLAIN, FakeTensor))
    card = torch.device(CARD)
    with (
        joined(0, num_ranks, card, transfer_dtype=transfer_dtype) as rank,
        plain,
        MODE,
        torch.inference_mode(),
    ):
        model = model_of((1, 1), "bfloat16", is_own=shares_modulation)
        given = arguments(text=text)
        later = later_of(model)
        if shares_modulation:
            shared = shared_by(rank)(model)
            # Where outputs lie among those that are joined is found out once.
            shared._compute(
                WHOLE_FORWARD,
                torch.empty(1, 1, model.hidden_size, device=CARD, dtype=torch.bfloat16),
            )
            rank.exchanges.noted.clear()
            shared.begin(plan, num_rows=1, is_driven=False)
        with Counter() as counter, ExitStack() as hooks:

            def now() -> list[int]:
                return [*counter.so_far, len(rank.exchanges.noted)]

            def enter(name: str, *_: Any) -> None:
                counts[name] = now()

            def leave(name: str, *_: Any) -> None:
                counts[name] = less(now(), counts[name])

            for name, (block,) in (
                ("double", model.double_blocks),
                ("single", model.single_blocks),
            ):
                hooks.callback(block.register_forward_pre_hook(partial(enter, name)).remove)
                hooks.callback(block.register_forward_hook(partial(leave, name)).remove)
            if num_ranks == 1:
                type(model)._forward(model, **given)
            else:
                forward_share(
                    model,
                    given,
                    plan=plan,
                    groups=rank.groups,
                    **{**NOTHING_ELSE, "later": later if overlaps else None},
                )
            outside = less(less(now(), counts["double"]), counts["single"])
    return {**counts, "outside": outside}


def shared_by(rank: Rank) -> Callable[[Any], SharedModulation]:
    """Return what has a rank hold its part of what modulates a model's blocks."""

    def share(model: Any) -> SharedModulation:
        assert rank.groups.everyone is not None
        with fake_tensors_as_plain():
            return SharedModulation(
                model,
                group=rank.groups.everyone,
                index=0,
                world_size=rank.groups.world_size,
                device=torch.device(CARD),
                bake=lambda _, weight: weight,
            )

    return share


class Reader(TorchDispatchMode):
    """Adds up the bytes of some weights, each time that a linear multiplies by them."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.num_bytes = 0
        self._weights = weights

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.linear:
            found = (weight for weight in args[1:] if _memory(weight) <= self._weights)
            self.num_bytes += sum(weight.nbytes for weight in found)
        return func(*args, **(kwargs or {}))


def modulation(num_ranks: int, *, blocks: Sequence[int], text: int) -> dict[str, int]:
    """Return bytes of modulation that the first of so many ranks has, and what a call takes of it.

    Returns:
        Bytes ``held`` of the weights that modulate blocks, ``read`` of them in a call of one row,
        and ``sent`` for them to other ranks.
    """
    plan = ParallelPlan(ulysses=num_ranks)
    with joined(0, num_ranks, torch.device(CARD)) as rank, MODE, torch.inference_mode():
        model = model_of(blocks, "bfloat16", is_own=True)
        given = arguments(text=text)
        shared = shared_by(rank)(model) if num_ranks > 1 else None
        weights = [
            weight
            for name, weight in model.named_parameters()
            if name.startswith(BLOCK_LISTS) and ("_mod." in name or ".modulation." in name)
        ]
        with Reader(_memory(weights)) as reader:
            if shared is None:
                type(model)._forward(model, **given)
            else:
                shared.begin(plan, num_rows=1, is_driven=False)
                forward_share(model, given, plan=plan, groups=rank.groups, **NOTHING_ELSE)
    held = sum(weight.nbytes for weight in weights)
    sent = 0 if shared is None else shared.bytes_sent
    return {"held": held, "read": reader.num_bytes, "sent": sent}


def seconds(
    ranks: Sequence[int], *, rounds: int, blocks: Sequence[int], text: int
) -> dict[int, list[float]]:
    """Time a forward at once on the first of so many ranks, each in turn, on the device ``meta``.

    A warm-up is left out. Nothing is computed, so what is timed is Python, and torch's dispatch.
    """
    sizes = {"double": blocks[0], "single": blocks[1], **FLUX1}
    model = flux("dev", **sizes, dtype=DTYPE, device="meta")
    given = arguments(text=text, device="meta")
    found: dict[int, list[float]] = {num_ranks: [] for num_ranks in ranks}
    for _ in range(1 + rounds):
        for num_ranks in ranks:
            plan = ParallelPlan(ulysses=num_ranks)
            with joined(0, num_ranks, torch.device("meta")) as rank, torch.inference_mode():
                start = time.perf_counter()
                if num_ranks == 1:
                    type(model)._forward(model, **given)
                else:
                    forward_share(model, given, plan=plan, groups=rank.groups, **NOTHING_ELSE)
                found[num_ranks].append(time.perf_counter() - start)
    return {num_ranks: times[1:] for num_ranks, times in found.items()}


class _Graph:
    """A graph of kernels that compute nothing."""

    num_replays = 0

    def replay(self) -> None:
        type(self).num_replays += 1


class _AllCan(CapturedForwards):
    """Ranks that are not there can do what this one can, and tensors without data are alike."""

    def _least(self, stage: Stage) -> Stage:
        return stage


def captured(num_ranks: int, *, text: int) -> dict[str, list[int]]:
    """Count a forward that is a CUDA graph, and the two before it.

    Returns:
        Calls, kernels, copies, exchanges and launches of a graph of each of three forwards.
    """
    plan, found = ParallelPlan(ulysses=num_ranks), {}
    stand_ins = {
        "CUDAGraph": _Graph,
        "graph": lambda *_, **__: nullcontext(),
        "stream": lambda *_: nullcontext(),
        "current_stream": lambda *_: None,
        "Stream": lambda *_: object(),
        "graph_pool_handle": lambda: 1,
    }
    with (
        joined(0, num_ranks, torch.device(CARD)) as rank,
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.object(torch, "equal", return_value=True),
        MODE,
        torch.inference_mode(),
    ):
        model = model_of((1, 1), "bfloat16")

        def share(given: Any) -> tuple[torch.Tensor, int]:
            return forward_share(
                model,
                given,
                plan=plan,
                groups=rank.groups,
                scaled={},
                residuals=Residuals(),
                patches=None,
                streams=StreamKeys(),
                later=later_of(model),
            )

        forwards = _AllCan(torch.device(CARD))
        for name in ("first", "captured", "replayed"):
            _Graph.num_replays = 0
            rank.exchanges.noted.clear()
            given = arguments(text=text)
            with Counter() as counter:
                outcome = forwards.compute(share, given, model=1, how=(), places=lambda: ())
            assert outcome.is_replayed == (name == "replayed")
            found[name] = [*counter.so_far, len(rank.exchanges.noted), _Graph.num_replays]
    return found


def less(these: list[int], those: list[int]) -> list[int]:
    """Subtract counts from counts."""
    return [a - b for a, b in zip(these, those, strict=True)]

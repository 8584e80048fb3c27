"""Bodies that run a plan's forwards on a card that is not there, for all ranks one by one.

Runs in: a ComfyUI process of ``process.py``.

Tensors have no data (``fake_flux.py``). What reads a value from the device raises, and so does what
mixes tensors of two devices.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from fake_exchange import Rank, joined
from fake_flux import CARD, FLUX1, LATENT, MODE, arguments, later_of, model_of
from forwards import own_attention
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from comfy_xdit_patch.planning.pipeline import num_patches, stage_blocks
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.planner import named_plan
from comfy_xdit_patch.planning.strategy import parse_strategy
from comfy_xdit_patch.wire import tensors as slices
from comfy_xdit_patch.worker.attention import masks as token_order
from comfy_xdit_patch.worker.forward import forward_share
from comfy_xdit_patch.worker.pipefusion.kept_keys import StreamKeys
from comfy_xdit_patch.worker.shard.node_patches import ModelPatches, Objects
from comfy_xdit_patch.worker.shard.residuals import Residuals
from comfy_xdit_patch.worker.weights.sharded_blocks import ShardedBlocks
from comfy_xdit_patch.worker.weights.shared_modulation import SharedModulation
from comfy_xdit_patch.worker.weights.stage_blocks import StagedBlocks
from comfy_xdit_patch.worker.weights.tensor_blocks import TensorBlocks

PATCHES = {
    "same_q_k_v": lambda q, k, v, pe, attn_mask, extra_options: {"q": q, "k": k, "v": v, "pe": pe},
    "same_result": lambda attention, extra_options: attention,
    "own_attention": own_attention,
}
NODES = {
    "patches": {"gathered": {"attn1_patch": ["same_q_k_v"], "attn1_output_patch": ["same_result"]}},
    "options": {"values": {}, "missing": []},
    "skip": [],
    "attention": {"function": "own_attention", "wants_order": True},
}
"""Nodes that nothing is known of: they see all tokens in ComfyUI's order."""


class Nodes(ModelPatches):
    """Patches whose functions are those of ``PATCHES``."""

    def _decode(self, tree: Any) -> Any:
        return PATCHES[tree]


class OnCpu(TorchDispatchMode):
    """Notes every operator that is given or returns a tensor on the CPU: a copy, or soon one."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.noted.append(str(func))
        return out


def forwards(
    plan: str,
    *,
    blocks: Sequence[int],
    calls: int = 1,
    ranks: Sequence[int] | None = None,
    **case: Any,
) -> list[dict[str, Any]]:
    """Make calls by a plan on every rank; return what each rank exchanged, made and returned.

    Args:
        plan: as ``XDIT_STRATEGY`` has it.
        blocks: how many double and single blocks.
        calls: how often a call is made; with PipeFusion an exact one and one that is not.
        ranks: which of them; by default all.
        case: see ``arguments`` and ``one_rank``.
    """
    strategy = parse_strategy(plan)
    world_size = strategy.degrees.world_size
    parallel = named_plan(strategy, world_size)
    gc.freeze()  # So many tensors are made that ComfyUI's own objects would be looked at often.
    with fake_tensors_as_plain():
        return [
            one_rank(parallel, rank, blocks, calls, mode=strategy.first_mode, **case)
            for rank in (range(world_size) if ranks is None else ranks)
        ]


def one_rank(
    plan: ParallelPlan,
    number: int,
    blocks: Sequence[int],
    calls: int,
    *,
    mode: str,
    stored: str = "bfloat16",
    nodes: bool = False,
    **sizes: Any,
) -> dict[str, Any]:
    """Make all calls on one rank.

    Args:
        mode: how the rank holds the weights.
        stored: dtype of the weights.
        nodes: whether there are patches of nodes.
    """
    for kept in (token_order.order_of, token_order.inverse_of):
        kept.cache_clear()
    results, on_cpu, num_groups = [], [], []
    with joined(number, plan.world_size, torch.device(CARD)) as rank, MODE, torch.inference_mode():
        is_cut = mode != "full" or plan.tensor > 1 or plan.pipefusion > 1
        model = model_of(blocks, stored, is_own=is_cut)
        given = arguments(**sizes)
        streams, residuals = StreamKeys(), Residuals()
        later = later_of(model)
        with cut(model, plan, rank, mode=mode) as sharded:
            for pipeline in pipelines(plan, given) * calls:
                with OnCpu() as cpu:
                    if isinstance(sharded, ShardedBlocks):
                        sharded.prefetch_first()
                    if isinstance(sharded, SharedModulation):
                        num_rows = given["x"].shape[0]
                        sharded.begin(plan, num_rows=num_rows, is_driven=False)
                    out, _ = forward_share(
                        model,
                        given,
                        plan=plan,
                        groups=rank.groups,
                        scaled={},
                        residuals=residuals,
                        patches=Nodes(NODES, Objects()) if nodes else None,
                        streams=streams,
                        later=later,
                        pipeline=pipeline,
                    )
                results.append([str(out.device), list(out.shape)])
                on_cpu.append(cpu.noted)
                num_groups.append(rank.num_groups)
    return {
        "exchanges": rank.exchanges.noted,
        "results": results,
        "on_cpu": on_cpu,
        "num_groups": num_groups,
    }


def alone(*, blocks: Sequence[int], **sizes: Any) -> list[str]:
    """Have ComfyUI make a call by itself; return the operators that had to do with the CPU."""
    with MODE, torch.inference_mode(), OnCpu() as cpu:
        model = model_of(blocks, "bfloat16")
        type(model)._forward(model, **arguments(**sizes))
    return cpu.noted


def noticed() -> dict[str, list[str]]:
    """Return what is noted of tensors from a list, of values that are read, and of what is neither.

    An error is noted by its name.
    """
    noted = {}
    with MODE, torch.inference_mode():
        row = torch.arange(4, device=CARD)
        for name, make in {
            "made on the card": lambda: row + torch.arange(4, device=CARD),
            "from a list": lambda: torch.tensor([0, 2], device=CARD),
            "indexed by a list": lambda: row[[0, 2]],
            "moved there": lambda: torch.arange(4).to(CARD),
            "fetched": lambda: row.cpu(),
            "asked": lambda: bool((row > 2).any()),
            "mixed": lambda: row + torch.arange(4),
        }.items():
            with OnCpu() as cpu:
                try:
                    make()
                except Exception as error:  # noqa: BLE001 - which one is what is asked
                    cpu.noted = [type(error).__name__]
            noted[name] = cpu.noted
    return noted


def pipelines(plan: ParallelPlan, given: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """How calls use PipeFusion: an exact one, then one that reads what that left."""
    if plan.pipefusion == 1:
        return [None]
    batch, text, _ = given["context"].shape
    image = LATENT[0] // 2 * (LATENT[1] // 2)
    patches = num_patches(plan, Workload(batch, text, image, FLUX1["hidden"] // 128))
    return [{"stream": 1, "is_warm_up": exact, "num_patches": patches} for exact in (True, False)]


@contextmanager
def cut(
    model: Any, plan: ParallelPlan, rank: Rank, *, mode: str
) -> Iterator[ShardedBlocks | SharedModulation | None]:
    """Have the rank hold the weights that it holds in this plan."""
    device, number = torch.device(CARD), rank.groups.rank
    if plan.tensor > 1:
        blocks = TensorBlocks(
            model,
            index=plan.tensor_index(number),
            degree=plan.tensor,
            device=device,
            bake=lambda _, weight: weight,
        )
        blocks.begin(rank.groups.of_plan(plan).tensor)
    if plan.pipefusion > 1:
        num_blocks = len(model.double_blocks) + len(model.single_blocks)
        StagedBlocks(model).keep(stage_blocks(plan, number, num_blocks))
    if mode == "full":
        yield None
        return
    if mode == "modulation":
        assert rank.groups.everyone is not None
        yield SharedModulation(
            model,
            group=rank.groups.everyone,
            index=number,
            world_size=plan.world_size,
            device=device,
            bake=lambda _, weight: weight,
        )
        return
    yield ShardedBlocks(
        model,
        group=rank.groups.weights,
        index=number,
        world_size=plan.world_size,
        device=device,
    )


@contextmanager
def fake_tensors_as_plain() -> Iterator[None]:
    """Have our code take a tensor without data for the plain tensor that it stands for."""
    classes = (*slices.PLAIN_CLASSES, FakeTensor)
    with mock.patch.object(slices, "PLAIN_CLASSES", classes):
        yield

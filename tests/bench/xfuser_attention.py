"""Attention of a sharded sequence: ours against xfuser's ``USP``, on the same ranks and numbers.

Runs in: the rig's environment; its ranks are processes on the CPU, one thread each, over gloo.

Ulysses and a ring of all ranks, 24 heads of FLUX.1's width, float32. Both take turns in every
round, and a round takes as long as its slowest rank. Both run torch's kernel on what they have
exchanged. Then both are held to attention's definition in float64. xfuser is given what it has for
each case: text that does not divide as joint tensors, padding behind the image with
``valid_kv_len``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench import xfuser_cpu
from bench.ranks import on_ranks
from bench.rows import Row, compared, rounded
from rig.trees import Tree

from comfy_xdit_patch.planning.cost.rank_time import ring_bytes, ulysses_bytes
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import SequenceShares
from comfy_xdit_patch.worker.attention.attention import SequenceAttention
from comfy_xdit_patch.worker.ranks.groups import PlanGroups

HEADS, WIDTH = 24, 128
AXES = ("ulysses", "ring")
DEADLINE_S = 600.0
VALUE_BYTES = 4


@dataclass(frozen=True)
class Case:
    """Sizes of one attention."""

    name: str
    text: int
    image: int
    heads: int = HEADS
    has_mask: bool = False


CASES = (
    Case("all divides", 64, 192),
    Case("77 text tokens", 77, 192),
    Case("image does not divide", 64, 193),
    Case("heads do not divide", 64, 192, heads=23),
    Case("mask", 64, 192, has_mask=True),
)


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """Times of both, then how exact both are."""
    sizes = [(256, 768)] if is_quick else [(256, 768), (512, 2560)]
    num_rounds = 7 if is_quick else 15
    found = []
    for num_ranks in (2, 4):
        ranks = on_ranks(num_ranks, run_rank, sizes, num_rounds, deadline_s=DEADLINE_S)
        for axis in AXES:
            found += _times(num_ranks, axis, [rank[axis] for rank in ranks])
            found += _errors(num_ranks, axis, [rank[axis]["cases"] for rank in ranks])
        found += [
            Row(f"xfuser, {num_ranks} ranks: {name}", None, "", parity=xfuser_cpu.said(found))
            for name, found in ranks[0]["others"].items()
        ]
    return found


def _times(num_ranks: int, axis: str, ranks: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for number, (text, image) in enumerate(ranks[0]["sizes"]):
        of_ranks = [rank["times"][number] for rank in ranks]
        ours, theirs = (
            [1000 * max(each) for each in zip(*(times[who] for times in of_ranks), strict=True)]
            for who in ("ours", "xfuser")
        )
        name = f"attention, {axis}={num_ranks}, {text} + {image} tokens: ours against xfuser's USP"
        rows.append(compared(name, "ms", ours, theirs))
        sent = ranks[0]["bytes"][number]
        formula = (ulysses_bytes if axis == "ulysses" else ring_bytes)(
            (text + image) * HEADS * WIDTH / num_ranks, num_ranks, 1, VALUE_BYTES
        )
        name = f"bytes a rank sends, {axis}={num_ranks}, {text} + {image} tokens: against formula"
        rows.append(compared(name, "B", [sent], [formula]))
    return rows


def _errors(num_ranks: int, axis: str, ranks: list[list[dict[str, Any]]]) -> list[Row]:
    rows = []
    for number, case in enumerate(CASES):
        of_ranks = [cases[number] for cases in ranks]
        ours = max(found["ours"] for found in of_ranks)
        assert ours <= xfuser_cpu.EXACT, f"{axis}={num_ranks}, {case}: {ours}"
        theirs = xfuser_cpu.worst([found["xfuser"] for found in of_ranks])
        name = f"error, {axis}={num_ranks}, {case.name}: ours against xfuser's USP"
        baseline = None if isinstance(theirs, str) else rounded(theirs)
        says = f"xfuser: {xfuser_cpu.said(theirs)}"
        rows.append(Row(name, rounded(ours), "relative", baseline, parity=says))
    return rows


def run_rank(rank: int, sizes: list[tuple[int, int]], num_rounds: int) -> dict[str, Any]:
    """Measure on one rank."""
    usp = xfuser_cpu.prepare()
    num_ranks = dist.get_world_size()
    found: dict[str, Any] = {}
    others = {
        "xFuserLongContextAttention()": xfuser_cpu.outcome(xfuser_cpu.make_long_context),
    }
    for axis in AXES:
        degrees = {name: num_ranks if name == axis else 1 for name in AXES}
        xfuser_cpu.have_groups(**degrees)
        plan = ParallelPlan(**degrees)
        world = dist.group.WORLD
        groups = PlanGroups(world, *((world, None) if axis == "ulysses" else (None, world)))
        of_axis: dict[str, Any] = {"sizes": sizes, "times": [], "bytes": []}
        for text, image in sizes:
            problem = Problem(Case("", text, image), plan, groups, rank, usp)
            of_axis["times"].append(problem.times(num_rounds))
            of_axis["bytes"].append(problem.bytes_sent())
        of_axis["cases"] = [Problem(case, plan, groups, rank, usp).errors() for case in CASES]
        found[axis] = of_axis
    for name in ("SDPA", "SDPA_MATH"):
        problem = Problem(CASES[0], plan, groups, rank, usp, backend=usp.AttentionBackendType[name])
        others[f"USP of a ring, backend {name}"] = xfuser_cpu.outcome(problem.error_of_xfuser)
    return {**found, "others": others}


class Problem:
    """One attention on one rank, by both."""

    def __init__(
        self,
        case: Case,
        plan: ParallelPlan,
        groups: PlanGroups,
        rank: int,
        usp: Any,
        backend: Any = None,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        length = case.text + case.image
        shape = (1, case.heads, length, WIDTH)
        self._qkv = [torch.randn(shape, generator=generator) for _ in range(3)]
        self._mask = torch.randn(length, length, generator=generator) if case.has_mask else None
        self._case, self._rank, self._usp = case, rank, usp
        self._num_ranks = plan.world_size
        self._shares: SequenceShares = plan.sequence_shares(
            rank,
            num_text_tokens=case.text,
            num_image_tokens=case.image,
            num_reference_tokens=0,
            num_heads=case.heads,
        )
        self._ours = SequenceAttention(shares=self._shares, index=rank, groups=groups)
        # Of xfuser's own backends none that runs on a CPU returns what a ring needs.
        own = usp.AttentionBackendType.SDPA if plan.ring == 1 else xfuser_cpu.FLASH_CPU
        self._backend = backend or own

    def times(self, num_rounds: int) -> dict[str, list[float]]:
        """Seconds of each round, by both in turn."""
        ours, theirs = self._with_ours(), self._with_xfuser()
        seconds: dict[str, list[float]] = {"ours": [], "xfuser": []}
        for number in range(num_rounds + 1):
            for who, call in (("ours", ours), ("xfuser", theirs)):
                dist.barrier()
                begin = time.perf_counter()
                call()
                if number:
                    seconds[who].append(time.perf_counter() - begin)
        return seconds

    def bytes_sent(self) -> int:
        """What this rank sent in one of ours."""
        before = self._ours.bytes_sent
        self._with_ours()()
        return self._ours.bytes_sent - before

    def errors(self) -> dict[str, float | str]:
        """How far each is from attention's definition on this rank's tokens."""
        return {
            "ours": self._error(self._with_ours()()),
            "xfuser": xfuser_cpu.outcome(self.error_of_xfuser),
        }

    def error_of_xfuser(self) -> float:
        """How far xfuser is from attention's definition on this rank's tokens."""
        return self._error(self._with_xfuser()())

    def _with_ours(self) -> Callable[[], torch.Tensor]:
        places = self._shares.places(self._rank)
        self._own = [token for start, end in places for token in range(start, end)]
        shard = [t[:, :, self._own].contiguous() for t in self._qkv]

        def call() -> torch.Tensor:
            return self._ours(whole_heads, *shard, self._case.heads, mask=self._mask)

        return call

    def _with_xfuser(self) -> Callable[[], torch.Tensor]:
        case, num_ranks = self._case, self._num_ranks
        image = list(range(case.text, case.text + case.image))
        num_padding = -case.image % num_ranks
        size = (case.image + num_padding) // num_ranks
        is_text_shared = case.text % num_ranks == 0
        text = case.text // num_ranks
        order, own = [], []
        for rank in range(num_ranks):
            tokens = list(range(rank * text, (rank + 1) * text)) if is_text_shared else []
            tokens += image[rank * size : (rank + 1) * size]
            order += tokens
            own = tokens if rank == self._rank else own
        rows = text * is_text_shared + size  # Padding stands behind the tokens of the last rank.
        shard = [F.pad(t[:, :, own], (0, 0, 0, rows - len(own))) for t in self._qkv]
        kwargs: dict[str, Any] = {}
        if num_padding:
            kwargs["attention_kwargs"] = {"valid_kv_len": case.text + case.image}
        if self._mask is not None:
            queries = order if num_ranks == self._shares.ulysses_degree else own
            kwargs["attention_kwargs"] = {"attn_mask": self._mask[queries][:, order][None, None]}
        if not is_text_shared:
            own = [*range(case.text), *own]
            joint = [t[:, :, : case.text].contiguous() for t in self._qkv]
            names = ("joint_query", "joint_key", "joint_value")
            kwargs |= {"joint_strategy": "front", **dict(zip(names, joint, strict=True))}
        self._own = own

        def call() -> torch.Tensor:
            out: torch.Tensor = self._usp.USP(
                *shard, combine_qkv_a2a=True, backend=self._backend, **kwargs
            )
            return out.transpose(1, 2).flatten(2)

        return call

    def _error(self, out: torch.Tensor) -> float:
        q, k, v = (t.double() for t in self._qkv)
        scores = q[:, :, self._own] @ k.mT * WIDTH**-0.5
        if self._mask is not None:
            scores += self._mask[self._own]
        expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        got = out[:, : len(self._own)].double()
        return ((got - expected).abs().max() / expected.abs().max()).item()


def whole_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None, **_: Any
) -> torch.Tensor:
    """Stand where ComfyUI's ``attention_pytorch`` stands."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)

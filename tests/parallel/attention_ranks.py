"""The ranks of ``test_sequence_attention.py``: attention on shards against attention on the whole.

Runs in: a process of its own that forks the ranks, so that torch is imported once; no ComfyUI.

    python attention_ranks.py FOLDER    writes FOLDER/RANK.json
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked_ranks import met, run_and_exit

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.transfers import TransferDtype, values_per_scale
from comfy_xdit_patch.worker.attention.attention import SequenceAttention
from comfy_xdit_patch.worker.attention.transfer_dtypes import dequantised, quantised
from comfy_xdit_patch.worker.attention.ulysses import HeadExchange, together
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import PlanGroups

WORLD_SIZE = 8
DEADLINE = datetime.timedelta(seconds=120)
PLANS = [
    ParallelPlan(ulysses=ulysses, ring=world_size // ulysses)
    for world_size in (2, 3, 4, 5, 6, 8)
    for ulysses in range(1, world_size + 1)
    if world_size % ulysses == 0
]
WEIGHTED = [
    ParallelPlan(ulysses=2, weights=(3, 1)),
    ParallelPlan(ring=2, weights=(3, 1)),
    ParallelPlan(ulysses=3, weights=(1, 2, 3)),
    ParallelPlan(ring=3, weights=(1, 2, 3)),
    ParallelPlan(ulysses=4, weights=(1, 1, 4, 2)),
    ParallelPlan(ulysses=2, ring=2, weights=(1, 1, 4, 2)),
    ParallelPlan(ulysses=2, ring=2, weights=(1, 9, 9, 1)),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BATCH, WIDTH = 2, 16
LARGEST_IN_8_BITS = 4
UNEVEN = {"text": 13, "image": 22, "references": 10, "heads": 5}
EVEN = {"text": 40, "image": 60, "references": 20, "heads": 24}
FEW_HEADS = {**UNEVEN, "heads": 2}
MASKS = ("pairs", "pairs of each row", "pairs of each head", "hidden text", "hidden ranks")


def cases() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for sizes in (UNEVEN, EVEN, FEW_HEADS):
            yield {"dtype": dtype, "sizes": sizes}
        yield {"dtype": dtype, "sizes": UNEVEN, "caches_references": True}
    for dtype in (torch.float32, torch.bfloat16):
        for mask in MASKS:
            yield {"dtype": dtype, "sizes": UNEVEN, "mask": mask}
    yield {"dtype": torch.float32, "sizes": UNEVEN, "mask": "pairs", "caches_references": True}
    yield {"dtype": torch.float32, "sizes": UNEVEN, "scale": 0.5}
    yield {"dtype": torch.float32, "sizes": UNEVEN, "is_prescribed": True}


def make_mask(name: str, shape: tuple[int, int, int, int], num_text: int) -> torch.Tensor:
    """Make a mask of (B, H, queries, keys) in one of the forms that nodes use."""
    batch, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(5)
    if name == "pairs":
        return torch.randn(queries, keys, generator=generator)
    if name == "pairs of each row":
        return torch.randn(batch, queries, keys, generator=generator)
    if name == "pairs of each head":
        return torch.randn(batch, heads, queries, keys, generator=generator)
    if name == "hidden text":  # padded on the left; in one row there is nothing else
        seen = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
        seen[0, ..., : num_text // 2] = False
        seen[1, ..., :num_text] = False
        return seen
    # Regions that do not see each other: for a query, whole ranks have no key that it sees. One
    # query sees no key at all.
    region = torch.arange(keys) * 3 // keys
    seen = region[:queries, None] == region[None]
    seen[4] = False
    return seen


def whole_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: Any
) -> torch.Tensor:
    """Compute attention by its definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v


def comfyui_like(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Stand where ComfyUI's ``attention_pytorch`` stands."""
    mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out.transpose(1, 2).flatten(2)


def of_a_checkpoint(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any
) -> torch.Tensor:
    """Stand where an attention that a checkpoint prescribes stands; it looks at positions."""
    return comfyui_like(q, later_is_louder(k), v, heads, **kwargs)


def later_is_louder(k: torch.Tensor) -> torch.Tensor:
    return k * torch.linspace(0.5, 2, k.shape[2], dtype=k.dtype)[None, None, :, None]


def not_called(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("the checkpoint prescribes another function")


@dataclass(frozen=True)
class Problem:
    """One attention, its mask, its arguments, and its result in one process."""

    name: str
    sizes: dict[str, int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    arguments: dict[str, Any]
    is_prescribed: bool
    expected: torch.Tensor
    error_alone: float


def pose(
    *,
    dtype: torch.dtype,
    sizes: dict[str, int],
    mask: str | None = None,
    caches_references: bool = False,
    scale: float | None = None,
    is_prescribed: bool = False,
) -> Problem:
    heads = sizes["heads"]
    length = sizes["text"] + sizes["image"] + sizes["references"]
    num_queries = length - sizes["references"] * caches_references
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, heads, length, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    q = q[:, :, :num_queries]
    values = None
    if mask is not None:
        values = make_mask(mask, (BATCH, heads, num_queries, length), sizes["text"])
    loud = later_is_louder(k) if is_prescribed else k
    expected = whole_attention(q, loud, v, values, scale).transpose(1, 2).flatten(2)
    alone = comfyui_like(q, loud, v, heads, mask=values, scale=scale)
    return Problem(
        name=mask or ("prescribed" if is_prescribed else "no mask"),
        sizes=sizes,
        q=q,
        k=k,
        v=v,
        arguments={"mask": values, "skip_reshape": True, "scale": scale},
        is_prescribed=is_prescribed,
        expected=expected,
        error_alone=relative(alone, expected),
    )


def solve(
    problem: Problem, plan: ParallelPlan, groups: PlanGroups, rank: int
) -> dict[str, Any] | None:
    """Compute this rank's shard, twice as two blocks would; None where planning refuses shares."""
    shares = plan.sequence_shares(
        rank,
        num_text_tokens=problem.sizes["text"],
        num_image_tokens=problem.sizes["image"],
        num_reference_tokens=problem.sizes["references"],
        num_heads=problem.sizes["heads"],
    )
    q, k, v = problem.q, problem.k, problem.v
    if q.shape != k.shape and min(shares.reference) < 1:
        return None
    mine = torch.tensor([t for start, end in shares.places(rank) for t in range(start, end)])
    queries = mine[mine < q.shape[2]]
    shard = q[:, :, queries], k[:, :, mine], v[:, :, mine]
    meanwhile: list[bool] = []
    attention = SequenceAttention(
        shares=shares,
        index=rank,
        groups=groups,
        meanwhile=lambda: meanwhile.append(collectives.is_in_one()),
    )
    run, function = attention, comfyui_like
    if problem.is_prescribed:
        if groups.ring is not None:
            return None
        run, function = attention.prescribed(of_a_checkpoint), not_called
    for _ in range(2):
        out = run(function, *shard, problem.sizes["heads"], **problem.arguments)
    assert out.dtype == q.dtype
    halved = SequenceAttention(
        shares=shares, index=rank, groups=groups, in_halves=min(shares.heads) >= 2
    )
    num_runs = 0

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_runs
        num_runs += 1
        return comfyui_like(*args, **kwargs)

    run, function = halved, counted
    if problem.is_prescribed:
        run, function = halved.prescribed(of_a_checkpoint), not_called
    out_halved = run(function, *shard, problem.sizes["heads"], **problem.arguments)
    assert 2 * halved.bytes_sent == attention.bytes_sent
    is_even = problem.sizes["heads"] % plan.ulysses == 0
    is_even = is_even and len({*shares.joint}) == 1 and q.shape == k.shape
    return {
        "plan": label(plan),
        "dtype": str(q.dtype).removeprefix("torch."),
        "case": problem.name,
        "error": relative(out, problem.expected[:, queries]),
        "error_alone": problem.error_alone,
        "is_even": is_even,
        "bytes_sent": attention.bytes_sent // 2,
        "bytes_whole": k.nbytes,
        "meanwhile": meanwhile,
        "num_runs": num_runs,
        "is_equal_in_halves": torch.equal(out, out_halved),
    }


HEAD_WIDTH = 64
IN_8_BITS: tuple[TransferDtype, ...] = ("int8", "fp8")


def exchange_in_8_bits(
    plan: ParallelPlan, groups: PlanGroups, rank: int, sizes: dict[str, int], of: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Exchange tokens for heads and back, in all forms; what arrives is known from the whole."""
    shares = plan.sequence_shares(
        rank,
        num_text_tokens=sizes["text"],
        num_image_tokens=sizes["image"],
        num_reference_tokens=sizes["references"],
        num_heads=sizes["heads"],
    )
    tokens = shares.joint
    ranks = range(plan.world_size)
    of_rank = [[t for a, b in shares.places(r) for t in range(a, b)] for r in ranks]
    order = [token for own in of_rank for token in own]
    generator = torch.Generator().manual_seed(7)
    shape = (3, BATCH, sizes["heads"], sum(tokens), HEAD_WIDTH)
    whole = torch.randn(shape, generator=generator).to(of)
    first = sum(shares.heads[:rank])
    heads = slice(first, first + shares.heads[rank])
    mine = [t[:, :, of_rank[rank]] for t in whole]
    parts = [(0, 1)] if min(shares.heads) < 2 else [(0, 2), (1, 2)]
    for dtype in ("exact", *IN_8_BITS):
        expected = whole if dtype == "exact" else rounded(whole, dtype)
        exchange = HeadExchange(heads=shares.heads, index=rank, group=groups.ulysses, dtype=dtype)
        arrived = torch.stack(exchange.tokens_for_heads(*mine, tokens=tokens))
        bytes_there = exchange.bytes_sent
        # As attention would return it: the second tensor's heads of this rank, all tokens.
        out = whole[1][:, heads][:, :, order].transpose(1, 2).flatten(2)
        back = exchange.heads_for_tokens(out, HEAD_WIDTH, tokens=tokens)
        halves = [
            HeadExchange(
                heads=shares.heads, index=rank, group=groups.ulysses, part=part, dtype=dtype
            )
            for part in parts
        ]
        there = [half.send_tokens(*mine, tokens=tokens) for half in halves]
        in_halves = torch.cat([torch.stack(half()) for half in there], dim=2)
        sizes_out = [half.local_heads * HEAD_WIDTH for half in halves]
        leaving = [
            half.send_heads(part, HEAD_WIDTH, tokens=tokens)
            for half, part in zip(halves, torch.split(out, sizes_out, 2), strict=True)
        ]
        back_in_halves = together(leaving)
        others = sum(shares.heads) - shares.heads[rank]
        yield {
            "plan": label(plan),
            "transfer": dtype,
            "dtype": str(of).removeprefix("torch."),
            "is_whole": torch.equal(arrived, expected[:, :, heads][:, :, :, order]),
            "is_back": torch.equal(
                back, expected[1][:, :, of_rank[rank]].transpose(1, 2).flatten(2)
            ),
            "is_equal_in_halves": torch.equal(arrived, in_halves)
            and torch.equal(back, back_in_halves),
            "error": ((expected.double() - whole).norm() / whole.double().norm()).item(),
            "values_there": 3 * BATCH * tokens[rank] * others * HEAD_WIDTH,
            "bytes_there": bytes_there,
            "values_back": BATCH * (sum(tokens) - tokens[rank]) * shares.heads[rank] * HEAD_WIDTH,
            "bytes_back": exchange.bytes_sent - bytes_there,
        }


def rounded(x: torch.Tensor, dtype: TransferDtype) -> torch.Tensor:
    """Return what is left of values that travelled, heads whole in the last dimension."""
    per_scale = values_per_scale(x.shape[-1])
    sent = quantised(x.contiguous().view(-1), dtype, per_scale)
    return dequantised(sent, dtype, per_scale, x.dtype).view(x.shape)


def label(plan: ParallelPlan) -> str:
    return f"{plan.name} {list(plan.weights)}" if plan.weights else plan.name


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()


def make_groups(plan: ParallelPlan, rank: int) -> PlanGroups:
    """Make the groups of a plan among the first ranks. Collective in the whole world."""
    world_size, degree = plan.world_size, plan.ulysses
    near = [list(range(i, i + degree)) for i in range(0, world_size, degree)]
    far = [list(range(i, world_size, degree)) for i in range(degree)]
    made = []
    for lists in (near, far):
        groups = [dist.new_group(ranks, timeout=DEADLINE) for ranks in lists]
        own = [g for g, ranks in zip(groups, lists, strict=True) if rank in ranks]
        made.append(own[0] if own and len(lists[0]) > 1 else None)
    return PlanGroups(sequence=None, ulysses=made[0], ring=made[1])


def run(rank: int, problems: list[Problem]) -> list[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    in_8_bits: list[dict[str, Any]] = []
    for plan in (*PLANS, *WEIGHTED):
        groups = make_groups(plan, rank)
        if rank < plan.world_size:
            with torch.inference_mode():
                solved = [solve(problem, plan, groups, rank) for problem in problems]
                found += [result for result in solved if result is not None]
                if plan.ring == 1 and plan.world_size <= LARGEST_IN_8_BITS:
                    for sizes in (EVEN, UNEVEN, FEW_HEADS):
                        for of in (torch.float32, torch.bfloat16):
                            in_8_bits += exchange_in_8_bits(plan, groups, rank, sizes, of)
    return [found, in_8_bits]


def main(rank: int, folder: Path, problems: list[Problem]) -> None:
    with met(rank, WORLD_SIZE, folder, DEADLINE):
        (folder / f"{rank}.json").write_text(json.dumps(run(rank, problems)))


if __name__ == "__main__":
    torch.set_num_threads(1)  # before anything computes: threads do not survive a fork
    given = Path(sys.argv[1]), [pose(**case) for case in cases()]
    run_and_exit(main, WORLD_SIZE, *given)

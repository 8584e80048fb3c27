"""How much of Ulysses' transfers hides behind the MLP's columns and attention, on slowed links.

Run: PYTHONPATH=tests python tests/bench/overlap.py [--tokens 1280] [--rounds N] [--dtype bfloat16]
         [--double 1] [--single 2] [--machines 4090 ...]

Two CPU ranks of one thread, each on a core of its own; ComfyUI's own blocks of FLUX.1's real width
(3072, 24 heads), on random numbers; ``HeadExchange`` through shared memory. The link's speed is
chosen by what this machine multiplies, so that transfers take the part of the computation that they
take on the machine named (``rig/slow_link.py`` waits). In turn, in every round:

    alone        nothing is exchanged: the computation of one rank's share
    memory       an unslowed link, everything at once, and overlapped: what overlap itself costs
    gloo         the same by torch's own transport between CPU ranks
    NAME         a slowed link, everything at once ("exposed"), and overlapped

Medians of steps. ``can_hide`` is what the model of cost says of these blocks, with the times of the
MLP's columns and of attention that were measured here; ``hidden`` is the part of it that was.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bench.ranks import mailboxes_at, on_ranks, shared_memory
from bench.rows import Row, compared
from rig.trees import Tree, trees_for_tests

WIDTH, HEADS, TEXT = 3072, 24, 256
NUM_RANKS = 2
DEADLINE_S = 3600.0
# What a card multiplies in bf16 (1e12/s; planning/cost/known_machines.py), and what its link brings
# each way (GB/s), as published.
MACHINES = {"4090": (150, 15.0), "5090": (186, 24.0), "L40S": (200, 20.0), "H100": (570, 200.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--machines", nargs="*", choices=MACHINES, default=list(MACHINES))
    options = parser.parse_args()
    tree = trees_for_tests()[-1]
    with shared_memory() as path:
        asked = str(tree.path), path, vars(options), options.machines
        found = on_ranks(NUM_RANKS, run_rank, *asked, deadline_s=DEADLINE_S)[0]
    del found["rounds_s"]
    json.dump({"comfyui": tree.version, **vars(options), **found}, sys.stdout, indent=1)


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """Overlap switched on against switched off, on each link."""
    options = {"tokens": 1280, "rounds": 3 if is_quick else 7, "dtype": "bfloat16"}
    options |= {"double": 1, "single": 2}
    machines = ["4090"] if is_quick else [*MACHINES]
    with shared_memory() as path:
        asked = str(tree.path), path, options, machines
        (found, _) = on_ranks(NUM_RANKS, run_rank, *asked, deadline_s=DEADLINE_S)
    parity = f"same bits: {found['are_bits_same']}"
    transports = (
        compared(
            f"a double and two single blocks, {kind}: exchanges by shared memory against gloo",
            "s",
            *(found["rounds_s"][f"{name} {kind}"] for name in ("memory", "gloo")),
            parity=parity,
        )
        for kind in ("exposed", "overlapped")
    )
    return [
        *transports,
        *(
            compared(
                f"a double and two single blocks, {link}: overlap on against off",
                "s",
                *(found["rounds_s"][f"{name} {kind}"] for kind in ("overlapped", "exposed")),
                parity=parity,
            )
            for name, link in (
                ("memory", "not slowed"),
                *((name, f"link as of {name}") for name in machines),
            )
        ),
    ]


def run_rank(
    rank: int, tree: str, path: str, options: dict[str, Any], machines: Sequence[str]
) -> dict[str, Any]:
    sys.argv = ["bench", "--cpu"]
    sys.path.insert(0, tree)
    import comfy.options

    comfy.options.enable_args_parsing()
    return Bench(rank, path, options).measured(machines)


class Bench:
    """One rank's blocks and its share of the tokens."""

    def __init__(self, rank: int, path: str, options: dict[str, Any]) -> None:
        import comfy.ops
        import torch
        import torch.distributed as dist
        from comfy.ldm.flux.layers import DoubleStreamBlock, ModulationOut, SingleStreamBlock

        from comfy_xdit_patch.planning.plan import ParallelPlan
        from comfy_xdit_patch.worker.attention.attention import SequenceAttention
        from comfy_xdit_patch.worker.ranks.groups import PlanGroups
        from comfy_xdit_patch.worker.shard.later_columns import LaterColumns

        self._mailboxes = mailboxes_at(path, rank, NUM_RANKS)
        self._rounds, self._tokens = options["rounds"], options["tokens"]
        dtype = getattr(torch, options["dtype"])
        plan = ParallelPlan(ulysses=NUM_RANKS)
        shares = plan.sequence_shares(
            rank,
            num_text_tokens=TEXT,
            num_image_tokens=options["tokens"] - TEXT,
            num_reference_tokens=0,
            num_heads=HEADS,
        )
        world = dist.group.WORLD
        generator = torch.Generator().manual_seed(1)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        with torch.device("cpu"):
            made = {"modulation": False, "dtype": dtype, "operations": comfy.ops.manual_cast}
            self.double_blocks = [
                DoubleStreamBlock(WIDTH, HEADS, 4, qkv_bias=True, **made)
                for _ in range(options["double"])
            ]
            self.single_blocks = [
                SingleStreamBlock(WIDTH, HEADS, **made) for _ in range(options["single"])
            ]
        for block in [*self.double_blocks, *self.single_blocks]:
            for parameter in block.parameters():
                parameter.copy_(numbers(*parameter.shape) * 0.02)
        self.img = numbers(1, shares.image[rank], WIDTH)
        self.txt = numbers(1, shares.text[rank], WIDTH)
        self.mod = ModulationOut(*(numbers(1, 1, WIDTH) for _ in range(3)))
        self.later = LaterColumns(SimpleNamespace(single_blocks=self.single_blocks))
        groups = PlanGroups(world, world, None)
        self._attentions = {
            is_later: SequenceAttention(
                shares=shares,
                index=rank,
                groups=groups,
                **({"meanwhile": self.later.compute, "in_halves": True} if is_later else {}),
            )
            for is_later in (False, True)
        }
        # Of one tensor of q, k, v or the output.
        self.wire_bytes = (self.img.nbytes + self.txt.nbytes) // 2
        self.local = numbers(1, shares.joint[rank], WIDTH)
        self.qkv = [numbers(1, shares.heads[rank], self._tokens, WIDTH // HEADS) for _ in range(3)]

    def step_s(self, link: Any, *, is_later: bool, is_alone: bool = False) -> float:
        """Seconds of all blocks, together with the other rank."""
        import torch
        import torch.distributed as dist

        from comfy_xdit_patch.worker.attention.ulysses import HeadExchange

        options = {"optimized_attention_override": self._attentions[is_later]}
        if is_alone:
            other = mock.patch.object(HeadExchange, "_all_to_all", same_size)
        else:
            other = nullcontext()  # type: ignore[assignment]
        img, txt = self.img.clone(), self.txt.clone()
        both = (self.mod, self.mod)
        dist.barrier()
        with other, link.used() if link else nullcontext():
            begin = time.perf_counter()
            with self.later.left() if is_later else nullcontext():
                for block in self.double_blocks:
                    img, txt = block(
                        img, txt, vec=(both, both), pe=None, transformer_options=options
                    )
                x = torch.cat((txt, img), 1)
                for block in self.single_blocks:
                    x = block(x, vec=self.mod, pe=None, transformer_options=options)
            self.out = x
            return time.perf_counter() - begin

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def measured(self, machines: Sequence[str]) -> dict[str, Any]:
        import torch
        import torch.distributed as dist
        from comfy.ldm.modules.attention import optimized_attention
        from rig.slow_link import SlowLink

        from comfy_xdit_patch.planning.cost.cost import exposed_in_parts_s
        from comfy_xdit_patch.worker.ranks import collectives

        linear = self.single_blocks[0].linear1
        both = self.seconds(lambda: linear(self.local))
        mlp_s = both * 4 / 7
        heads = self.qkv[0].shape[1]
        attention_s = self.seconds(lambda: optimized_attention(*self.qkv, heads, skip_reshape=True))
        rate = torch.tensor([2 * self.local.numel() * 7 * WIDTH / both / 1e12])
        dist.all_reduce(rate, op=dist.ReduceOp.MIN)  # The same links on both ranks.
        teraflops = float(rate)
        links = {name: SlowLink(math.inf) for name in ("memory", "gloo")}
        speeds = {
            name: gbs * 1e9 * teraflops / tf
            for name, (tf, gbs) in MACHINES.items()
            if name in machines
        }
        links |= {name: SlowLink(speed) for name, speed in speeds.items()}
        times: dict[str, list[float]] = {}
        outs: dict[str, torch.Tensor] = {}
        for number in range(self._rounds + 1):
            rows = [("alone", None, False)]
            rows += [
                (f"{name} {kind}", link, kind == "overlapped")
                for name, link in links.items()
                # A round for nothing first, in which a slower link would touch nothing new.
                if number or name not in speeds
                for kind in ("exposed", "overlapped")
            ]
            for name, link, is_later in rows:
                collectives.mailboxes = None if name.startswith("gloo") else self._mailboxes
                seconds = self.step_s(link, is_later=is_later, is_alone=link is None)
                outs[name] = self.out
                if number:
                    times.setdefault(name, []).append(seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        num_double, num_single = len(self.double_blocks), len(self.single_blocks)
        rows_found = {}
        for name in links:
            exposed, overlapped = medians[f"{name} exposed"], medians[f"{name} overlapped"]
            row = {"exposed_s": exposed, "overlapped_s": overlapped, "ratio": exposed / overlapped}
            if name in speeds:
                transfer_s = 4 * self.wire_bytes / speeds[name]
                can_hide = sum(
                    number
                    * (
                        transfer_s
                        - exposed_in_parts_s(
                            transfer_s,
                            meanwhile_s=meanwhile_s,
                            attention_s=attention_s,
                            num_parts=2,
                        )
                    )
                    for number, meanwhile_s in ((num_double, 0.0), (num_single, mlp_s))
                )
                row |= {
                    "link_MB_per_s": speeds[name] / 1e6,
                    "transfers_s": (num_double + num_single) * transfer_s,
                    "can_hide_s": can_hide,
                    "hidden": (exposed - overlapped) / can_hide,
                }
            rows_found[name] = {key: float(f"{value:.3g}") for key, value in row.items()}
        return {
            "teraflops": round(teraflops, 3),
            "alone_s": float(f"{medians['alone']:.3g}"),
            "mlp_columns_s": float(f"{mlp_s:.3g}"),
            "are_bits_same": all(
                outs[f"{name} exposed"].equal(outs[f"{name} overlapped"]) for name in links
            ),
            "rounds_s": times,
            "attention_s": float(f"{attention_s:.3g}"),
            **rows_found,
        }


def same_size(
    _: Any, data: Any, group: Any, width: int, *, sent: Any, received: Any
) -> Callable[[], Any]:
    """Exchange nothing: a rank computes with what it has."""
    return lambda: data.new_zeros(sum(received))


if __name__ == "__main__":
    main()

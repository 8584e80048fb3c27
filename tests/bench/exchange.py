"""Tokens for heads between CPU ranks: through shared memory against gloo.

Run: PYTHONPATH=tests python tests/bench/exchange.py [--rounds N]

Ranks of one thread; q, k and v of FLUX.1 (3072 wide) go to the ranks that take their heads, each
rank a part to each other one, by ``collectives.all_to_all_async`` and ``finish``. Both ways take
turns in every round, after a barrier. Prints a table.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from typing import Any

from bench.ranks import mailboxes_at, on_ranks, shared_memory
from bench.rows import Row, compared, text_of
from rig.trees import Tree

WIDTH, NUM_TENSORS = 3072, 3
RANKS, TOKENS, DTYPES = (2, 4), (1280, 4352), ("bfloat16", "float32")
DEADLINE_S = 600.0
WARM_UP = 10
"""Rounds. By then all of the memory has pages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    print(text_of(measured(parser.parse_args().rounds)))  # noqa: T201 - a script's answer


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """All sizes; no ComfyUI has part in it."""
    return measured(5 if is_quick else 15)


def measured(rounds: int) -> list[Row]:
    found = []
    for num_ranks in RANKS:
        with shared_memory() as path:
            times = on_ranks(num_ranks, run_rank, path, num_ranks, rounds, deadline_s=DEADLINE_S)[0]
        for tokens, dtype in product(TOKENS, DTYPES):
            case = times[f"{tokens} {dtype}"]
            found.append(
                compared(
                    f"q, k and v of {tokens} tokens in {dtype} among {num_ranks} ranks: shared "
                    "memory against gloo",
                    "ms",
                    case["memory"],
                    case["gloo"],
                    parity=f"same bits: {case['are_bits_same']}; {case['MB']:.1f} MB a rank",
                )
            )
    return found


def run_rank(rank: int, path: str, num_ranks: int, rounds: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from comfy_xdit_patch.worker.ranks import collectives

    ways = {"gloo": None, "memory": mailboxes_at(path, rank, num_ranks)}
    found: dict[str, Any] = {}
    for tokens, dtype in product(TOKENS, DTYPES):
        size = tokens // num_ranks * (WIDTH // num_ranks) * NUM_TENSORS
        data = torch.randn(size * num_ranks).to(getattr(torch, dtype))
        outs = {name: torch.empty_like(data) for name in ways}
        times: dict[str, Any] = {name: [] for name in ways}
        for number in range(-WARM_UP, rounds):
            for name, ways_mailboxes in ways.items():
                collectives.mailboxes = ways_mailboxes
                dist.barrier()
                begin = time.perf_counter()
                sizes = [size] * num_ranks
                work = collectives.all_to_all_async(
                    outs[name], data, received=sizes, sent=sizes, group=dist.group.WORLD
                )
                collectives.finish([work])
                if number >= 0:
                    times[name].append(1e3 * (time.perf_counter() - begin))
        times["are_bits_same"] = outs["gloo"].equal(outs["memory"])
        times["MB"] = size * (num_ranks - 1) * data.element_size() / 1e6
        found[f"{tokens} {dtype}"] = times
    return found


if __name__ == "__main__":
    main()

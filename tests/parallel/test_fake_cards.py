"""Every plan's forwards of FLUX.1, at its true width, on cards that are not there.

All ranks of a plan run one after the other in one process, on tensors that have a device and no
data. What is found this way: tensors on the wrong device, copies from lists, values that the CPU
waits for, exchanges that do not fit together. What is not: wrong numbers, races, memory, speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from exchange_order import misfits, misplaced
from inside.client import Inside
from rig.breadth import is_whole
from rig.trees import Tree

CARD = "cuda:0"
LATENT = [128, 128]
REFERENCES = [[95, 81], [64, 64]]
"""The first one's sides are odd."""

NUM_GROUPS = {
    # That of the weights, which a rank makes when it joins, and those of its first call.
    "ulysses=2": 1,
    "ulysses=3": 1,
    "ulysses=8": 1,
    "ring=3": 1,
    "ulysses=2,ring=2": 5,
    "tensor=2": 1,
    "tensor=2,ulysses=2": 5,
    "batch=2,ulysses=2": 3,
    "pipefusion=2,ulysses=2": 5,
    "ulysses=3,fsdp=3": 1,
    "ulysses=3,modulation=3": 1,
    "batch=2,ulysses=2,modulation=4": 3,
}
EXCHANGES = {
    # Of the first rank; in the end the result's tokens are gathered once. A block has four
    # all-to-alls, in halves of the heads; two where a half is too little work, or with a ring.
    "ulysses=2": {"all_to_all": 8, "all_gather": 1},
    "ulysses=3": {"all_to_all": 8, "all_gather": 1},
    "ulysses=8": {"all_to_all": 4, "all_gather": 1},
    "ring=3": {"pass_on": 4, "all_gather": 1},
    "ulysses=2,ring=2": {"all_to_all": 4, "pass_on": 2, "all_gather": 1},
    # Sums: of two streams, in attention and in the MLP, and of the single block.
    "tensor=2": {"all_gather": 3, "sum": 5},
    "tensor=2,ulysses=2": {"all_gather": 4, "sum": 5, "all_to_all": 8},
    "batch=2,ulysses=2": {"all_to_all": 8, "all_gather": 1},
    # One block; a call that is exact, and one of four patches.
    "pipefusion=2,ulysses=2": {"all_to_all": 10, "pair": 5},
    # One block more, and the weights of three.
    "ulysses=3,fsdp=3": {"all_to_all": 12, "all_gather": 1 + 3},
    "ulysses=3,modulation=3": {"all_to_all": 8, "all_gather": 1 + 1},
    # The rows of both parts of the batch, and what modulates them.
    "batch=2,ulysses=2,modulation=4": {"all_to_all": 8, "all_gather": 1 + 2},
}
EVERYTHING = {"text": 256, "batch": 2, "references": REFERENCES, "mask": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"text": 512},
    "everything": EVERYTHING,
    "batch": {"text": 512, "batch": 2},
    "references": {"text": 512, "references": REFERENCES},
    "mask": {"text": 256, "mask": True},
}
USUALLY = ("plain", "everything")
LIKE_OTHERS = ("ulysses=2", "ulysses=8")
"""These do nothing that three ranks do not: usually one case is enough."""
PARTICULAR: dict[str, dict[str, Any]] = {
    # Nodes' patches that look at all tokens, and weights that are not of the dtype of the sums.
    "ulysses=3": {"text": 512, "nodes": True},
    "ulysses=2": {"text": 512, "stored": "float8_e4m3fn"},
    "tensor=2": {"text": 512, "stored": "float8_e4m3fn"},
    "ulysses=2,fsdp=2": {"text": 512, "stored": "float8_e4m3fn"},
    "ulysses=2,modulation=2": {"text": 512, "stored": "float8_e4m3fn"},
}


def blocks_of(plan: str, name: str) -> list[int]:
    """How many double and single blocks show everything that a plan does between two of them."""
    if "fsdp" in plan:
        return [1, 2]  # Three weight shards for two windows.
    if "pipefusion" in plan and name == "everything":
        return [2, 0]  # Text and image go on to the next stage apart.
    return [1, 1]


@pytest.fixture
def fake(tree: Tree, inside: Callable[..., Inside]) -> Callable[..., Any]:
    """Call a body of ``inside/fake_cards.py`` in a ComfyUI without ranks."""
    process = inside(tree, XDIT_STRATEGY="off")

    def call(function: str, **arguments: Any) -> Any:
        return process.call(f"fake_cards:{function}", **arguments)

    return call


def check(ranks: list[dict[str, Any]], *, rows: list[int]) -> None:
    """See that every rank stayed on its card, and that all fit together.

    Args:
        rows: of each rank's result.
    """
    for rank, num_rows in zip(ranks, rows, strict=True):
        for result in rank["results"]:
            assert result == [CARD, [num_rows, 16, *LATENT]]
        assert rank["on_cpu"] == [[]] * len(rank["results"])
        assert misplaced(rank["exchanges"], CARD) == []
    assert all(rank["exchanges"] for rank in ranks)
    assert misfits([rank["exchanges"] for rank in ranks]) == []


def test_copies_and_reads_are_noticed_and_comfyui_makes_none(fake: Callable[..., Any]) -> None:
    noticed = fake("noticed")
    assert noticed.pop("made on the card") == []
    assert noticed.pop("asked") == ["DataDependentOutputException"]
    assert noticed.pop("mixed") == ["RuntimeError"]
    assert sorted(noticed) == ["fetched", "from a list", "indexed by a list", "moved there"]
    assert all(noticed.values()), noticed
    for name in USUALLY:
        assert fake("alone", blocks=[1, 1], **CASES[name]) == []


@pytest.mark.parametrize("plan", NUM_GROUPS)
def test_all_ranks_of_a_plan_stay_on_their_cards_and_fit_together(
    fake: Callable[..., Any], plan: str
) -> None:
    names = USUALLY[:1] if plan in LIKE_OTHERS else USUALLY
    for name in CASES if is_whole() else names:
        case = dict(CASES[name])
        share = case.get("batch", 1)
        if "batch" in plan:
            case["batch"] = 2 * share
        ranks = fake("forwards", plan=plan, blocks=blocks_of(plan, name), **case)
        check(ranks, rows=[share] * len(ranks))
        for rank in ranks:
            assert set(rank["num_groups"]) == {NUM_GROUPS[plan]}
        if name == "plain":
            ops = [exchange["op"].split()[0] for exchange in ranks[0]["exchanges"]]
            assert {op: ops.count(op) for op in ops} == EXCHANGES[plan]


@pytest.mark.parametrize("plan", PARTICULAR)
def test_what_nodes_and_stored_dtypes_add_stays_on_the_card(
    fake: Callable[..., Any], plan: str
) -> None:
    ranks = fake("forwards", plan=plan, blocks=[1, 1], **PARTICULAR[plan])
    check(ranks, rows=[1] * len(ranks))


@pytest.mark.parametrize("plan", ["ulysses=2,ring=2", "tensor=2,ulysses=2", "batch=2,ulysses=2"])
def test_no_group_is_made_after_the_first_call_of_a_plan(
    fake: Callable[..., Any], plan: str
) -> None:
    case = {"text": 512, "batch": 2 if "batch" in plan else 1}
    (rank,) = fake("forwards", plan=plan, blocks=[1, 1], calls=2, ranks=[0], **case)
    assert rank["num_groups"] == [NUM_GROUPS[plan]] * 2

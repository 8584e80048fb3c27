"""Where weights lie, for every size of card: boundaries, order, figures."""

from __future__ import annotations

import dataclasses

import pytest

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.residency import (
    CUDA_CONTEXT_BYTES,
    GIB,
    MIB,
    MODES,
    NCCL_GROUP_BYTES,
    Card,
    ModelSizes,
    ResidencyPlan,
    TokenLoad,
    gib,
    need_of,
    plan_residency,
)

# About FLUX.1-dev in bf16.
MODEL = ModelSizes(
    total_bytes=22 * GIB, largest_block_bytes=650 * MIB, outside_blocks_bytes=128 * MIB
)
LOAD = TokenLoad(num_image_tokens=4096, num_text_tokens=256, hidden_size=3072)


def cards(memory_bytes, num_ranks, *, has_host=False):
    return tuple(
        Card(memory_bytes, memory_bytes, has_host=has_host and rank == 0)
        for rank in range(num_ranks)
    )


def planned(memory_bytes, num_ranks=4, *, model=MODEL, load=LOAD, has_host=False):
    return plan_residency(model, load, cards=cards(memory_bytes, num_ranks, has_host=has_host))


def needed(mode, num_ranks=4, **kwargs):
    """Bytes of one mode, found on a card that has room for no mode before it."""
    for memory in range(64 * GIB, 0, -64 * MIB):
        plan = planned(memory, num_ranks, **kwargs)
        if isinstance(plan, ResidencyPlan) and plan.mode == mode:
            return plan.needs[-1].num_bytes
    raise AssertionError(f"{mode} is never chosen")


@pytest.mark.parametrize(
    ("gib_of_card", "mode"), [(80, "full"), (25, "full"), (24, "full"), (23, "sharded")]
)
def test_the_mode_follows_the_card(gib_of_card, mode):
    assert planned(gib_of_card * GIB).mode == mode


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_ends_at_the_byte_at_which_it_does_not_fit(mode, num_ranks):
    num_bytes = needed(mode, num_ranks)
    fits, too_small = planned(num_bytes, num_ranks), planned(num_bytes - 1, num_ranks)
    assert fits.mode == mode
    assert isinstance(too_small, Refusal) or too_small.mode != mode
    if mode == MODES[-1]:
        assert isinstance(too_small, Refusal)
    else:
        assert MODES.index(too_small.mode) > MODES.index(mode)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_more_memory_never_means_a_slower_mode(num_ranks):
    order = []
    for memory in range(0, 40 * GIB, 256 * MIB):
        plan = planned(memory, num_ranks)
        order.append(-1 if isinstance(plan, Refusal) else len(MODES) - MODES.index(plan.mode))
    assert order == sorted(order)
    assert set(order) == ({-1, 1, 3} if num_ranks == 1 else {-1, 1, 2, 3})


def test_more_ranks_need_less_of_each_card():
    sharded = [needed("sharded", n) for n in (2, 3, 4, 8)]
    assert sharded == sorted(sharded, reverse=True)
    full = [needed("full", n) for n in (2, 4, 8)]
    assert full == sorted(full, reverse=True)
    assert MODEL.total_bytes < full[-1]


@pytest.mark.parametrize(
    "change", [{"num_image_tokens": 16384}, {"num_rows": 2}, {"bytes_per_value": 4}]
)
@pytest.mark.parametrize("mode", MODES)
def test_more_work_needs_more(mode, change):
    assert needed(mode, load=dataclasses.replace(LOAD, **change)) > needed(mode)


def test_the_card_with_comfyuis_process_is_the_tightest():
    need = planned(24 * GIB, has_host=True).needs[0]
    assert need.rank == 0
    assert need.num_bytes - needed("full") == CUDA_CONTEXT_BYTES


def test_the_tightest_card_decides():
    unequal = (Card(80 * GIB, 80 * GIB), Card(80 * GIB, 20 * GIB), Card(48 * GIB, 48 * GIB))
    plan = plan_residency(MODEL, LOAD, cards=unequal)
    assert plan.mode == "sharded"
    assert {need.rank for need in plan.needs} == {1}
    assert "of 20.0 GiB on rank 1" in plan.lines()[0]


def test_one_card_is_not_sharded_and_has_no_communication():
    assert planned(23 * GIB, 1).mode == "offload"
    assert planned(24 * GIB, 1).mode == "full"
    assert not any("NCCL" in cost.what for cost in planned(24 * GIB, 1).needs[0].costs)


def test_gathers_have_a_group_of_their_own():
    def nccl(plan):
        return next(cost.num_bytes for cost in plan.needs[-1].costs if "NCCL" in cost.what)

    assert nccl(planned(80 * GIB)) == NCCL_GROUP_BYTES
    assert nccl(planned(12 * GIB)) == 2 * NCCL_GROUP_BYTES


def test_a_weight_that_is_cast_is_counted():
    cast = dataclasses.replace(MODEL, cast_bytes=GIB)
    assert needed("full", model=cast) - needed("full") == pytest.approx(GIB * 1.1, abs=2)


def test_the_text_adds_up():
    plan = planned(12 * GIB, has_host=True)
    first, *rest = plan.lines()
    need = plan.needs[-1]
    assert first == (f"weights sharded over the ranks: {gib(need.num_bytes)} of 12.0 GiB on rank 0")
    shown = [float(line.split()[0]) for line in rest if line.lstrip()[0].isdigit()]
    assert len(shown) == len(need.costs)
    assert sum(shown) == pytest.approx(need.num_bytes / GIB, abs=0.05 * len(shown))
    assert rest[-1].startswith("  does not fit: all weights on every card: 2")


def test_a_refusal_has_the_figures_of_every_mode():
    refusal = planned(2 * GIB)
    assert isinstance(refusal, Refusal)
    assert "does not fit on 4 cards" in refusal.reason
    for text in ("all weights on every card: 23.5 of 2.0 GiB", "sharded", "in CPU memory: 2.9 of"):
        assert text in refusal.reason


@pytest.mark.parametrize("mode", MODES)
def test_the_need_of_one_mode_is_that_of_the_plan_that_has_it(mode):
    asked = need_of(mode, MODEL, LOAD, cards=cards(24 * GIB, 4))
    assert asked.num_bytes == needed(mode)
    assert asked.mode == mode


def test_what_is_kept_from_step_to_step_is_counted_without_slack():
    kept = dataclasses.replace(LOAD, kept_bytes=3 * GIB)
    assert needed("full", load=kept) == needed("full") + 3 * GIB


def test_who_asks_for_shards_gets_them_where_copies_fit_too():
    roomy = cards(1 << 40, 4)
    assert plan_residency(MODEL, LOAD, cards=roomy).mode == "full"
    assert plan_residency(MODEL, LOAD, cards=roomy, first="sharded").mode == "sharded"
    assert plan_residency(MODEL, LOAD, cards=cards(1 << 40, 1), first="sharded").mode == "full"


def test_the_largest_share_of_unequal_ranks_is_what_has_to_fit():
    two = cards(48 * GIB, 2)
    even, unequal = (
        need_of("full", MODEL, dataclasses.replace(LOAD, local_tokens=tokens), cards=two)
        for tokens in (None, 3264)
    )
    share = next(c for c in unequal.costs if c.what.startswith("activations"))
    assert share.what == "activations, 3264 of 4352 tokens"
    assert unequal.num_bytes > even.num_bytes

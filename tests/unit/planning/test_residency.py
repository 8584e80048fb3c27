"""Where weights lie, for every size of card: boundaries, order, figures."""

from __future__ import annotations

import dataclasses

import pytest

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.residency import (
    CUDA_CONTEXT_BYTES,
    GIB,
    MIB,
    MODES,
    NCCL_GROUP_BYTES,
    Card,
    ModelSizes,
    ResidencyPlan,
    gib,
    need_of,
    plan_residency,
    token_load,
)

# About FLUX.1-dev in bf16.
MODEL = ModelSizes(
    total_bytes=22 * GIB,
    largest_block_bytes=650 * MIB,
    outside_blocks_bytes=128 * MIB,
    modulation_bytes=6 * GIB,
)
IN_FP8 = ModelSizes(
    total_bytes=11 * GIB,
    largest_block_bytes=325 * MIB,
    outside_blocks_bytes=64 * MIB,
    cast_bytes=128 * MIB,
    modulation_bytes=3 * GIB,
    as_cast=MODEL,
)
NUM_BLOCKS = 57


def cards(memory_bytes, num_ranks, *, has_host=False):
    return tuple(
        Card(memory_bytes, memory_bytes, has_host=has_host and rank == 0)
        for rank in range(num_ranks)
    )


def load_of(num_ranks=4, **changes):
    """Of an image of 1024 x 1024 px whose tokens the ranks share."""
    load = token_load(
        ParallelPlan(ulysses=num_ranks),
        Workload(1, num_text_tokens=256, num_image_tokens=4096, num_heads=24),
        num_blocks=NUM_BLOCKS,
        hidden_size=3072,
    )
    return dataclasses.replace(load, **changes)


def planned_on(where, *, model=MODEL, load=None, first="full"):
    plan = ParallelPlan(ulysses=len(where))
    load = load or load_of(len(where))
    return plan_residency(plan, model, load, num_blocks=NUM_BLOCKS, cards=where, first=first)


def planned(memory_bytes, num_ranks=4, *, has_host=False, **kwargs):
    return planned_on(cards(memory_bytes, num_ranks, has_host=has_host), **kwargs)


def asking_for(mode):
    """A model that can lie so, and what has it lie so where it fits."""
    return {"model": IN_FP8, "first": "modulation"} if mode == "cast" else {"model": MODEL}


def needed(mode, num_ranks=4, **kwargs):
    """Bytes of one mode, found on a card that has room for no mode before it."""
    kwargs = {**asking_for(mode), **kwargs}
    for memory in range(64 * GIB, 0, -64 * MIB):
        plan = planned(memory, num_ranks, **kwargs)
        if isinstance(plan, ResidencyPlan) and plan.mode == mode:
            return plan.needs[-1].num_bytes
    raise AssertionError(f"{mode} is never chosen")


@pytest.mark.parametrize(
    ("gib_of_card", "mode"),
    [(80, "full"), (24, "full"), (23, "modulation"), (19.5, "modulation"), (18.5, "sharded")],
)
def test_the_mode_follows_the_card(gib_of_card, mode):
    assert planned(int(gib_of_card * GIB)).mode == mode


@pytest.mark.parametrize(
    ("gib_of_card", "mode"),
    [(80, "cast"), (20, "cast"), (19, "modulation"), (12, "modulation"), (10, "sharded")],
)
def test_weights_are_cast_once_where_that_is_asked_for_and_fits(gib_of_card, mode):
    assert planned(int(gib_of_card * GIB), model=IN_FP8, first="modulation").mode == mode


def test_weights_that_are_cast_once_take_what_those_of_that_dtype_take():
    assert needed("cast") == needed("modulation")
    text = planned(24 * GIB, model=IN_FP8, first="modulation").lines()[0]
    assert text.startswith("weights cast once, modulation shared over the ranks, all else on every")


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        ({}, "cast"),
        ({"first": "full"}, "full"),
        ({"first": "sharded"}, "sharded"),
        ({"first": "offload"}, "offload"),
        ({"may_cast": False}, "modulation"),
        ({"model": MODEL}, "modulation"),
        ({"where": cards(80 * GIB, 1)}, "full"),
        ({"plan": ParallelPlan(tensor=4)}, "tensor"),
        ({"plan": ParallelPlan(pipefusion=4)}, "staged"),
    ],
)
def test_weights_are_cast_once_by_those_who_share_the_modulation_by_name(change, mode):
    change = {"where": cards(80 * GIB, 4), "model": IN_FP8, "plan": None, **change}
    change.setdefault("first", "modulation")
    where, model = change.pop("where"), change.pop("model")
    plan = change.pop("plan") or ParallelPlan(ulysses=len(where))
    load = load_of(len(where))
    found = plan_residency(plan, model, load, num_blocks=NUM_BLOCKS, cards=where, **change)
    assert found.mode == mode


@pytest.mark.parametrize(
    ("num_ranks", "saved"), [(2, 3 * GIB), (3, 4 * GIB), (4, 4.5 * GIB), (8, 5.25 * GIB)]
)
def test_a_rank_holds_its_part_of_the_modulation_and_all_else(num_ranks, saved):
    assert needed("full", num_ranks) - needed("modulation", num_ranks) == saved


@pytest.mark.parametrize("memory", [23 * GIB, 12 * GIB, 4 * GIB])
def test_a_model_whose_blocks_have_no_modulation_goes_on_to_shards(memory):
    without = dataclasses.replace(MODEL, modulation_bytes=0)
    tried = [need.mode for need in planned(memory, model=without).needs]
    assert "modulation" not in tried
    with_it = [need.mode for need in planned(memory).needs]
    assert tried == [mode for mode in (*with_it, "sharded") if mode != "modulation"][: len(tried)]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_ends_at_the_byte_at_which_it_does_not_fit(mode, num_ranks):
    num_bytes = needed(mode, num_ranks)
    fits, too_small = (planned(num_bytes - less, num_ranks, **asking_for(mode)) for less in (0, 1))
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
    assert set(order) == ({-1, 1, 4} if num_ranks == 1 else {-1, 1, 2, 3, 4})


def test_more_ranks_need_less_of_each_card():
    sharded = [needed("sharded", n) for n in (2, 3, 4, 8)]
    assert sharded == sorted(sharded, reverse=True)
    full = [needed("full", n) for n in (2, 4, 8)]
    assert full == sorted(full, reverse=True)
    assert MODEL.total_bytes < full[-1]


@pytest.mark.parametrize(
    "change",
    [{"local_tokens": 4096}, {"num_tokens": 16384}, {"num_rows": 2}, {"bytes_per_value": 4}],
)
@pytest.mark.parametrize("mode", MODES)
def test_more_work_needs_more(mode, change):
    assert needed(mode, load=load_of(**change)) > needed(mode)


def test_the_card_with_comfyuis_process_is_the_tightest():
    need = planned(24 * GIB, has_host=True).needs[0]
    assert need.rank == 0
    assert need.num_bytes - needed("full") == CUDA_CONTEXT_BYTES


def test_the_tightest_card_decides():
    unequal = (Card(80 * GIB, 80 * GIB), Card(80 * GIB, 20 * GIB), Card(48 * GIB, 48 * GIB))
    plan = planned_on(unequal)
    assert plan.mode == "modulation"
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
    assert rest[-2].startswith("  does not fit: all weights on every card: 2")
    assert rest[-1].startswith("  does not fit: modulation shared over the ranks")


def test_a_refusal_has_the_figures_of_every_mode():
    refusal = planned(2 * GIB)
    assert isinstance(refusal, Refusal)
    assert "does not fit on 4 cards" in refusal.reason
    for text in ("all weights on every card: 23.5 of 2.0 GiB", "sharded", "in CPU memory: 2.9 of"):
        assert text in refusal.reason


@pytest.mark.parametrize("mode", MODES)
def test_the_need_of_one_mode_is_that_of_the_plan_that_has_it(mode):
    asked = need_of(mode, asking_for(mode)["model"], load_of(), cards=cards(24 * GIB, 4))
    assert asked.num_bytes == needed(mode)
    assert asked.mode == mode


def test_what_is_kept_from_step_to_step_is_counted_without_slack():
    assert needed("full", load=load_of(kept_bytes=3 * GIB)) == needed("full") + 3 * GIB


def test_who_asks_for_shards_gets_them_where_copies_fit_too():
    roomy = cards(1 << 40, 4)
    assert planned_on(roomy).mode == "full"
    for mode in MODES:
        if mode != "cast":
            assert planned_on(roomy, first=mode).mode == mode
    assert planned_on(cards(1 << 40, 1), first="sharded").mode == "full"


def test_the_largest_share_of_unequal_ranks_is_what_has_to_fit():
    two = cards(48 * GIB, 2)
    even, unequal = (
        need_of("full", MODEL, load_of(2, **change), cards=two)
        for change in ({}, {"local_tokens": 3264})
    )
    share = next(c for c in unequal.costs if c.what.startswith("activations"))
    assert share.what == "activations, 3264 of 4352 tokens"
    assert unequal.num_bytes > even.num_bytes


IMAGE = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=65280, num_heads=24)


@pytest.mark.parametrize(
    ("plan", "rows", "tokens", "num_rows"),
    [
        (ParallelPlan(ulysses=2), 1, 32768, 1),
        (ParallelPlan(ulysses=2, weights=(3, 1)), 1, 49152, 1),
        (ParallelPlan(batch=2, ulysses=2, weights=(3, 1, 1, 1)), 3, 49152, 2),
        (ParallelPlan(batch=2), 3, 65536, 2),
        (ParallelPlan(ulysses=2, tensor=2), 1, 32768, 1),
        (ParallelPlan(ulysses=2, pipefusion=2), 1, 32768, 1),
    ],
)
def test_the_load_is_that_of_the_rank_that_has_most(plan, rows, tokens, num_rows):
    workload = dataclasses.replace(IMAGE, batch_size=rows)
    load = token_load(plan, workload, num_blocks=NUM_BLOCKS, hidden_size=3072)
    assert (load.local_tokens, load.num_rows, load.num_tokens) == (tokens, num_rows, 65536)
    assert (load.kept_bytes > 0) == (plan.pipefusion > 1)
    assert load.num_groups == plan.num_communicators

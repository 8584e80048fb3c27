"""Batch first, then the sequence; every rank works or the call is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest

from comfy_xdit_patch.errors import Refusal, Scope, SettingsError
from comfy_xdit_patch.planning.plan import Workload
from comfy_xdit_patch.planning.planner import check_strategy, legal_strategies, plan_call
from comfy_xdit_patch.planning.strategy import AUTO, Strategy, parse_strategy

IMAGE_1024 = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=4096, num_heads=24)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "expected"),
    [
        (1, 1, "single"),
        (1, 4, "ulysses=4"),
        (1, 7, "ulysses=7"),
        (2, 2, "batch=2"),
        (2, 4, "batch=2,ulysses=2"),
        (2, 3, "ulysses=3"),  # two rows on three ranks: equal shares only along the sequence
        (3, 6, "batch=3,ulysses=2"),
        (4, 6, "batch=2,ulysses=3"),
        (4, 2, "batch=2"),
        (8, 4, "batch=4"),
    ],
)
def test_the_batch_is_shared_first_and_the_sequence_takes_the_rest(
    batch_size, world_size, expected
):
    plan = plan_call(dataclasses.replace(IMAGE_1024, batch_size=batch_size), world_size=world_size)
    assert plan.name == expected
    assert plan.world_size == world_size


def test_a_batch_whose_tensors_do_not_all_have_its_rows_is_shared_along_the_sequence():
    workload = dataclasses.replace(IMAGE_1024, batch_size=2, is_batch_divisible=False)
    assert plan_call(workload, world_size=2).name == "ulysses=2"


@pytest.mark.parametrize(("num_text", "num_image"), [(3, 4096), (256, 3)])
def test_too_few_tokens_for_the_ranks_are_refused_for_this_step(num_text, num_image):
    workload = dataclasses.replace(IMAGE_1024, num_text_tokens=num_text, num_image_tokens=num_image)
    refusal = plan_call(workload, world_size=4)
    assert isinstance(refusal, Refusal)
    assert refusal.scope is Scope.STEP
    assert "fewer tokens than 4 ranks need" in refusal.reason


def test_few_tokens_are_no_obstacle_where_the_batch_alone_is_shared():
    workload = dataclasses.replace(IMAGE_1024, batch_size=4, num_text_tokens=1, num_image_tokens=1)
    assert plan_call(workload, world_size=4).name == "batch=4"


@pytest.mark.parametrize(
    ("text", "world_size", "expected"),
    [
        ("ulysses", 4, "ulysses=4"),
        ("ring", 3, "ring=3"),
        ("ring", 1, "single"),
        ("usp", 4, "ulysses=2,ring=2"),
        ("usp", 8, "ulysses=4,ring=2"),
        ("usp", 9, "ulysses=3,ring=3"),
        ("batch", 2, "batch=2"),
        ("cfg", 2, "batch=2"),
        ("batch=2,ring=2,ulysses=3", 12, "batch=2,ulysses=3,ring=2"),
        ("ring=2,cfg=2", 4, "batch=2,ring=2"),
        ("tensor", 3, "tensor=3"),
        ("tensor=2,ulysses=2,cfg=2", 8, "batch=2,ulysses=2,tensor=2"),
        ("fsdp", 4, "batch=2,ulysses=2"),
        ("fsdp=4", 4, "ulysses=4"),
        ("fsdp=4,ring=4", 4, "ring=4"),
        ("modulation=4", 4, "ulysses=4"),
        ("batch=2,ulysses=2,modulation=4", 4, "batch=2,ulysses=2"),
        ("pipefusion", 4, "pipefusion=4"),
        ("ulysses=2,pipefusion=2", 4, "pipefusion=2,ulysses=2"),
        ("batch=2,pipefusion=2,ulysses=2", 8, "batch=2,pipefusion=2,ulysses=2"),
    ],
)
def test_a_named_strategy_is_followed_and_nothing_else(text, world_size, expected):
    workload = dataclasses.replace(IMAGE_1024, batch_size=2)
    strategy = parse_strategy(text)
    check_strategy(strategy, world_size=world_size)
    assert plan_call(workload, world_size=world_size, strategy=strategy).name == expected


PRIME = "auto; ulysses; ring; batch; tensor; fsdp; pipefusion; off"
THREE = "ring=3; tensor=3; ulysses=3; batch=3; pipefusion=3"


@pytest.mark.parametrize(
    ("text", "world_size", "legal"),
    [
        ("usp", 3, f"{PRIME}; {THREE}"),
        ("usp", 1, PRIME),
        (
            *("ulysses=2,ring=2", 2),
            f"{PRIME}; ring=2; tensor=2; ulysses=2; batch=2; pipefusion=2",
        ),
        (
            *("ring=2", 4),
            "auto; ulysses; ring; usp; batch; tensor; fsdp; pipefusion; off; "
            "ring=4; ring=2,tensor=2; tensor=4; ulysses=2,ring=2; ulysses=2,tensor=2; ulysses=4; "
            "batch=2,ring=2; batch=2,tensor=2; batch=2,ulysses=2; batch=4; "
            "pipefusion=2,ulysses=2; batch=2,pipefusion=2; pipefusion=4",
        ),
        ("ulysses=3,fsdp=2", 3, f"{PRIME}; {THREE}"),
        ("tensor=3,fsdp=3", 3, f"{PRIME}; {THREE}"),
        ("ulysses=3,modulation=2", 3, f"{PRIME}; {THREE}"),
        ("ulysses=3,fsdp=3,modulation=3", 3, f"{PRIME}; {THREE}"),
        ("tensor=3,modulation=3", 3, f"{PRIME}; {THREE}"),
        ("pipefusion=3,fsdp=3", 3, f"{PRIME}; {THREE}"),
    ],
)
def test_a_strategy_that_no_call_could_follow_is_refused_with_those_that_fit(
    text, world_size, legal
):
    with pytest.raises(SettingsError) as caught:
        check_strategy(parse_strategy(text), world_size=world_size)
    assert f'XDIT_STRATEGY="{text}" does not fit {world_size} ranks: ' in str(caught.value)
    assert str(caught.value).endswith(f" Legal: {legal}.")


@pytest.mark.parametrize(
    ("text", "world_size", "product"),
    [
        ("batch=2", 4, "batch 2 x pipefusion 1 x ring 1 x ulysses 1 x tensor 1"),
        ("batch=3,ulysses=2", 4, "batch 3 x pipefusion 1 x ring 1 x ulysses 2 x tensor 1"),
        ("ulysses=2", 1, "batch 1 x pipefusion 1 x ring 1 x ulysses 2 x tensor 1"),
        ("cfg=2,ulysses=2,ring=2", 4, "batch 2 x pipefusion 1 x ring 2 x ulysses 2 x tensor 1"),
    ],
)
def test_degrees_that_do_not_make_the_world_are_an_error_with_the_numbers(
    text, world_size, product
):
    with pytest.raises(SettingsError, match=rf": {product} is not world_size {world_size}\. "):
        check_strategy(parse_strategy(text), world_size=world_size)


def test_a_ring_inside_of_pipefusion_is_refused_and_says_why():
    with pytest.raises(SettingsError, match="A ring inside of pipefusion would pass all keys"):
        check_strategy(parse_strategy("pipefusion=2,ring=2"), world_size=4)


def test_cut_blocks_inside_of_pipefusion_are_refused_and_say_why():
    with pytest.raises(SettingsError, match="both share out the blocks' weights") as caught:
        check_strategy(parse_strategy("pipefusion=2,tensor=2"), world_size=4)
    assert not re.search(r"Legal: .*pipefusion=2,tensor=2", str(caught.value))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_auto_never_takes_an_approximation(world_size, batch_size):
    workload = dataclasses.replace(IMAGE_1024, batch_size=batch_size)
    assert plan_call(workload, world_size=world_size).is_exact


@pytest.mark.parametrize("world_size", range(1, 13))
def test_every_strategy_that_is_called_legal_is(world_size):
    for text in legal_strategies(world_size):
        if text != "off":
            check_strategy(parse_strategy(text), world_size=world_size)
            workload = dataclasses.replace(IMAGE_1024, batch_size=world_size)
            plan = plan_call(workload, world_size=world_size, strategy=parse_strategy(text))
            assert plan.world_size == world_size


@pytest.mark.parametrize("strategy", ["batch", "batch=2,ulysses=2", "batch=4"])
def test_fewer_rows_than_a_named_plan_has_parts_are_refused(strategy):
    strategy = parse_strategy(strategy)
    workload = dataclasses.replace(IMAGE_1024, batch_size=1)
    refusal = plan_call(workload, world_size=4, strategy=strategy)
    assert isinstance(refusal, Refusal)
    assert refusal.scope is Scope.STEP
    assert re.search(r"in [24] parts, and this one has fewer rows", refusal.reason)


@pytest.mark.parametrize(
    ("strategy", "batch_size", "weights", "expected"),
    [
        ("batch", 5, (), (2, 1, 1, 1)),
        ("batch", 9, (3, 1, 2, 2), (4, 1, 2, 2)),
        ("batch", 4, (9, 1, 1, 1), (1, 1, 1, 1)),
        ("batch=2,ulysses=2", 3, (), (2, 2, 1, 1)),
        ("batch=2,ulysses=2", 8, (1, 2, 4, 5), (2, 2, 6, 6)),
    ],
)
def test_rows_of_a_named_plan_are_dealt_by_weight_and_every_part_has_one(
    strategy, batch_size, weights, expected
):
    workload = dataclasses.replace(IMAGE_1024, batch_size=batch_size)
    plan = plan_call(workload, world_size=4, strategy=parse_strategy(strategy), weights=weights)
    rows = [plan.batch_rows(rank, batch_size) for rank in range(4)]
    assert tuple(end - first for first, end in rows) == expected
    assert rows[0][0] == 0
    assert rows[-1][1] == batch_size


@pytest.mark.parametrize(
    ("batch_size", "world_size", "weights", "expected"),
    [
        (2, 2, (1000, 970), "batch=2"),
        (2, 2, (2, 1), "ulysses=2"),  # a row each would keep the first waiting for half a step
        (4, 2, (3, 1), "batch=2"),  # three rows and one
        (2, 4, (2, 1, 2, 1), "batch=2,ulysses=2"),
        (2, 4, (2, 2, 1, 1), "ulysses=4"),
        (4, 4, (2, 2, 1, 1), "ulysses=4"),
        (6, 4, (2, 2, 1, 1), "batch=2,ulysses=2"),  # four rows for the faster pair
    ],
)
def test_auto_shares_rows_only_where_they_suit_the_speeds(
    batch_size, world_size, weights, expected
):
    workload = dataclasses.replace(IMAGE_1024, batch_size=batch_size)
    plan = plan_call(workload, world_size=world_size, weights=weights)
    assert (plan.name, plan.weights) == (expected, weights)


def test_weights_that_leave_a_rank_without_a_reference_give_way_to_even_shares():
    workload = dataclasses.replace(IMAGE_1024, num_reference_tokens=4)
    plan = plan_call(workload, world_size=3, weights=(9, 9, 1), needs_references=True)
    assert plan.weights == ()
    assert plan_call(workload, world_size=3, weights=(9, 9, 1)).weights == (9, 9, 1)


def test_the_reason_of_a_refusal_is_that_of_even_shares():
    workload = dataclasses.replace(IMAGE_1024, num_text_tokens=2)
    assert "fewer tokens" in plan_call(workload, world_size=3, weights=(9, 9, 1)).reason


def test_a_named_batch_is_refused_where_something_belongs_to_all_rows():
    workload = dataclasses.replace(IMAGE_1024, batch_size=4, is_batch_divisible=False)
    refusal = plan_call(workload, world_size=4, strategy=Strategy("batch"))
    assert isinstance(refusal, Refusal)
    assert "belongs to all rows" in refusal.reason


def test_attention_that_cannot_go_round_a_ring_is_refused_for_a_ring_only():
    reason = Refusal("no log-sum-exp", Scope.STEP)
    for strategy in (Strategy("ring"), Strategy("usp"), parse_strategy("batch=2,ring=2")):
        workload = dataclasses.replace(IMAGE_1024, batch_size=2)
        assert plan_call(workload, world_size=4, strategy=strategy, no_ring=reason) is reason
    for strategy in (AUTO, Strategy("ulysses")):
        plan = plan_call(IMAGE_1024, world_size=4, strategy=strategy, no_ring=reason)
        assert plan.name == "ulysses=4"


def test_more_parts_than_heads_are_refused_for_the_run():
    workload = dataclasses.replace(IMAGE_1024, num_heads=3)
    refusal = plan_call(workload, world_size=4, strategy=Strategy("tensor"))
    assert isinstance(refusal, Refusal)
    assert refusal.scope is Scope.RUN
    assert refusal.reason.endswith("in 4 parts (tensor), and the model has 3")
    plan = parse_strategy("tensor=2,ulysses=2")
    assert plan_call(workload, world_size=4, strategy=plan).name == "ulysses=2,tensor=2"


def test_tokens_are_counted_for_all_ranks_of_ring_and_ulysses():
    workload = dataclasses.replace(IMAGE_1024, num_text_tokens=3)
    assert isinstance(plan_call(workload, world_size=4, strategy=Strategy("usp")), Refusal)

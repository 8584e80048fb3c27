"""What the check prints and writes, and when it says that the product works."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from comfy_xdit_patch.check.cases import (
    OURS,
    SPLIT,
    STATIC,
    STOCK,
    CardMemory,
    CaseResult,
    with_status,
)
from comfy_xdit_patch.check.comparison import LEAST_BOUND, Difference
from comfy_xdit_patch.check.machine import Gpu, Machine
from comfy_xdit_patch.check.model_file import Sizes
from comfy_xdit_patch.check.report import (
    COLUMNS,
    Setup,
    as_json,
    rounding_bound,
    table,
    verdict,
)

GIB = 1 << 30
GPUS = tuple(Gpu("NVIDIA GeForce RTX 4090", f"GPU-{n}", 24 * GIB) for n in range(8))
SETUP = Setup(
    package="0.1.0",
    comfyui="0.33.0",
    driver="580.00",
    machine=Machine(GPUS, ("link host bridge, no peer-to-peer: ranks 0-1",), "2.9", "12.8", None),
    sizes=Sizes(3072, 2, 4),
    size_px=1024,
    num_steps=4,
)
MEMORY = tuple(CardMemory(gpu.uuid, GIB, 3 * GIB, None) for gpu in GPUS)
RUN = {"steps": 4, "steps_parallel": 4, "plan": "ulysses=2"}
OUR = CaseResult(
    OURS,
    is_ours=True,
    seconds_per_step=0.25,
    run=RUN,
    forwards=(4, 4),
    outside_s=0.0021,
    launch_bound=(False, None),
    residency=("all weights on every card: 1.9 of 24.0 GiB on rank 0",),
    memory=MEMORY,
    latent=Path("somewhere"),
    difference=Difference(6e-3, 62.0),
)


def results(ours: CaseResult = OUR, **changes: CaseResult | None) -> list[CaseResult]:
    stock = CaseResult(STOCK, is_ours=False, seconds_per_step=0.5, memory=MEMORY)
    split = replace(stock, name=SPLIT, difference=Difference(5e-3, 60.0))
    known: dict[str, CaseResult | None] = {"stock": stock, "split": split, "ours": ours, **changes}
    return [result for result in known.values() if result is not None]


def test_steps_that_are_parallel_and_as_near_to_stock_as_two_stock_runs_are_well():
    text, is_working = verdict(results(), num_ranks=2)
    assert is_working
    assert text == (
        "It works here: 4 of 4 steps in parallel on 2 GPUs, error 6.0e-03 of at most 1.0e-02, "
        "2.00 times stock's speed."
    )


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (replace(OUR, error="ComfyUI ended with code 1.\nmore"), "ComfyUI ended with code 1."),
        (replace(OUR, run={**RUN, "steps_parallel": 3}), "3 of 4 steps were parallel"),
        (replace(OUR, run={**RUN, "steps": 0, "steps_parallel": 0}), "0 of 0 steps were parallel"),
        (replace(OUR, run=None), "0 of 0 steps were parallel"),
        (replace(OUR, forwards=(4, 3)), "the ranks computed [4, 3] steps of 4"),
        (replace(OUR, forwards=(4,)), "the ranks computed [4] steps of 4"),
        (
            replace(OUR, difference=Difference(2e-2, 40.0)),
            "the latent is 2.0e-02 from stock's, and rounding is at most 1.0e-02",
        ),
    ],
)
def test_what_is_wrong_is_said(ours, reason):
    text, is_working = verdict(results(ours), num_ranks=2)
    assert not is_working
    assert text == f"It does not work here: {reason}"


def test_without_two_stock_images_nothing_is_known():
    text, is_working = verdict(results(split=None), num_ranks=2)
    assert not is_working
    assert "no two stock images" in text


def test_the_verdict_is_that_of_default_options_and_names_others_that_fail():
    other = replace(OUR, name=STATIC, error="out of memory")
    text, is_working = verdict([*results(), other], num_ranks=2)
    assert is_working
    assert text.endswith(f"Not so with {STATIC}: out of memory.")


def test_with_one_gpu_nothing_was_shared():
    text, is_working = verdict(results(replace(OUR, forwards=(4,))), num_ranks=1)
    assert is_working
    assert "4 of 4 steps on one rank (there is one GPU" in text


def test_two_stock_runs_that_are_equal_by_chance_leave_room_for_one_rounding():
    same = CaseResult(SPLIT, is_ours=False, difference=Difference(0.0, None))
    assert rounding_bound([same]) == LEAST_BOUND
    assert rounding_bound(results()) == pytest.approx(1e-2)
    assert rounding_bound([]) is None


def test_the_table_has_100_columns_with_eight_cards_too():
    failed = replace(
        OUR, name=STATIC, error="x " * 200, fall_back_reasons={"gradients are wanted": 3}
    )
    text = table(SETUP, [*results(), failed])
    assert max(map(len, text.splitlines())) <= COLUMNS
    for part in (
        "ours                    4 of 4    6.0e-03    62.0     0.250   2.00     2.1         GPU\n",
        "An error of 1.0e-02 is allowed",
        "1.0 / 3.0 / -",
        "rank 7 of 24.0",
        "ours, no dynamic VRAM fell back 3 times: gradients are wanted",
        "Planned, ours: ulysses=2\n  all weights on every card",
        "driver 580.00",
        "NCCL none",
    ):
        assert part in text, text


def test_the_json_is_numbered_and_holds_every_case():
    whole = as_json(SETUP, results(), text="a verdict", is_working=True)
    assert json.loads(json.dumps(whole))["setup"]["num_steps"] == 4
    assert whole["schema"] == 1
    assert [case["name"] for case in whole["cases"]] == [STOCK, SPLIT, OURS]
    assert whole["cases"][2]["difference"] == {"max_error": 6e-3, "psnr_db": 62.0}
    assert "latent" not in whole["cases"][2]
    assert whole["setup"]["machine"]["gpus"][1]["uuid"] == "GPU-1"


def test_only_the_measured_image_counts_of_the_status():
    def status(forwards: int, host_s: float | None) -> dict[str, object]:
        rank = {"forwards": forwards, "is_launch_bound": True}
        return {
            "ranks": [{"rank": n, "step_s": s, **rank} for n, s in enumerate((0.2, 0.3))],
            "last_step_s": host_s,
            "last_run": RUN,
            "fell_back": [],
            "residency": ["a line"],
        }

    found = with_status(CaseResult(OURS, is_ours=True), status(4, None), status(8, 0.301))
    assert found.forwards == (4, 4)
    assert found.outside_s == pytest.approx(1e-3)
    assert found.launch_bound == (True, True)
    assert found.residency == ("a line",)

"""The cost model's own logic: what each part reacts to. Its figures: test_calibration.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rig.published import make_job

from comfy_xdit_patch.planning.cost.candidate import SINGLE, Candidate
from comfy_xdit_patch.planning.cost.cost import (
    INTERFERENCE,
    QUANTISE_BYTES,
    exposed_in_parts_s,
    predict,
    speeds,
)
from comfy_xdit_patch.planning.cost.known_machines import machine_of
from comfy_xdit_patch.planning.cost.model_shape import EAGER
from comfy_xdit_patch.planning.cost.rank_time import Part, compute_time, ring_bytes

COMPILED = {"execution": "compiled", "text": 512}


def time(gpus, plan=SINGLE, *, link=None, sockets=1, streamed_bytes=0, **job):
    machine = machine_of(gpus, link=link, num_sockets=sockets)
    return predict(plan, make_job(**job), machine, streamed_bytes=streamed_bytes)


def test_one_gpu_only_computes():
    alone = time("1xh100", **COMPILED)
    assert alone.communication_s == alone.bubble_s == alone.host_s == 0
    # 59.5 TFLOP of linears at 570 x 4608 / 4680, 14.9 of attention, 6.46 GB of modulation.
    assert alone.total_s == pytest.approx(0.1060 + 0.0261 + 0.0019, abs=2e-4)


def test_modulation_is_what_sharing_tokens_does_not_divide():
    job, gpu = make_job(**COMPILED), machine_of("1xh100").gpus[0]
    whole, quarter = (compute_time(job, gpu, Part(num_rows=1, tokens=part)) for part in (1, 0.25))
    assert whole.modulation_s == quarter.modulation_s == pytest.approx(6.457e9 / 3.35e12, rel=1e-3)
    # Fewer rows, less efficient: more than a quarter of the time.
    assert 0.25 < quarter.linear_s / whole.linear_s < 0.27


def test_linears_are_never_faster_than_reading_their_weights():
    job, gpu = make_job(**COMPILED), machine_of("1xh100").gpus[0]
    few = compute_time(job, gpu, Part(num_rows=1, tokens=0.01))
    assert few.linear_s == pytest.approx(2 * (11.901e9 - 3.229e9) / 3.35e12, rel=1e-3)


def test_every_patch_reads_the_weights_anew():
    job, gpu = make_job(precision="fp8", **COMPILED), machine_of("1xh100").gpus[0]
    whole, patches = (
        compute_time(job, gpu, Part(num_rows=1, stage=0.5, num_patches=n)) for n in (1, 16)
    )
    assert patches.modulation_s == whole.modulation_s
    # Half of the blocks' weights; those that modulate are cast once.
    assert patches.cast_s - whole.cast_s == pytest.approx(
        15 * 3 * 0.5 * (11.901e9 - 3.229e9) / 3.35e12, rel=1e-3
    )


def test_fp8_reads_half_and_casts_unless_it_multiplies():
    gpu = machine_of("1xh100").gpus[0]
    part = Part(num_rows=1)
    bf16, stored, multiplied = (
        compute_time(make_job(precision=name, **COMPILED), gpu, part)
        for name in ("bf16", "fp8", "fp8-compute")
    )
    assert multiplied.modulation_s == bf16.modulation_s / 2
    assert stored.modulation_s == bf16.modulation_s
    assert stored.linear_s == bf16.linear_s
    assert bf16.cast_s == multiplied.cast_s == 0
    assert stored.cast_s == pytest.approx(3 * 11.901e9 / 3.35e12, rel=1e-3)
    assert multiplied.linear_s == pytest.approx(bf16.linear_s * 570 / 993)


def test_a_card_that_does_not_multiply_fp8_casts_instead():
    a100 = machine_of("1xa100").gpus[0]
    job = make_job(precision="fp8-compute", **COMPILED)
    assert compute_time(job, a100, Part(num_rows=1)).cast_s > 0


def test_the_step_of_eight_gpus_is_that_of_the_study():
    """5.37x at 1024 px and 6.76x at 2048 px for plain Ulysses on 8 H100."""
    for px, speedup in ((1024, 5.37), (2048, 6.76)):
        one, eight = (
            time(f"{n}xh100", Candidate(ulysses=n), px=px, overlaps=False, **COMPILED).total_s
            for n in (1, 8)
        )
        assert one / eight == pytest.approx(speedup, rel=0.05)


@pytest.mark.parametrize("plan", [Candidate(ulysses=4), Candidate(ring=4), Candidate(tensor=4)])
def test_a_slower_link_is_felt(plan):
    nvlink, pcie, host = (
        time("4xh100", plan, link=link).communication_s for link in ("nvlink", "pcie", "host")
    )
    assert nvlink < pcie < host


def test_batch_needs_no_communication():
    pair = time("2xl20", Candidate(batch=2), rows=2)
    assert pair.communication_s == 0
    assert pair.compute_s == pytest.approx(time("1xl20").compute_s)


def test_an_odd_row_is_waited_for():
    three = time("2xl20", Candidate(batch=2), rows=3)
    assert three.compute_s == pytest.approx(time("1xl20", rows=2).compute_s)


@pytest.mark.parametrize("px", [2048, 4096])
def test_a_ring_hides_behind_attention_where_there_is_enough_of_it(px):
    machine = machine_of("4xh100")
    job = make_job(px=px, **COMPILED)
    sent_s = ring_bytes(job.num_tokens * 3072 / 4, 4, 57) / 200e9
    assert predict(Candidate(ring=4), job, machine).communication_s < 0.5 * sent_s
    short = make_job(px=1024, **COMPILED)
    sent_s = ring_bytes(short.num_tokens * 3072 / 4, 4, 57) / 200e9
    assert predict(Candidate(ring=4), short, machine).communication_s > 0.9 * sent_s


def test_heads_that_do_not_divide_cost_the_rounding():
    job = make_job(**COMPILED)
    machine = machine_of("5xh100")
    five = predict(Candidate(ulysses=5), job, machine)
    gpu = machine.gpus[0]
    even = compute_time(job, gpu, Part(num_rows=1, tokens=0.2, heads=0.2)).total_s
    rounded = compute_time(job, gpu, Part(num_rows=1, tokens=0.2, heads=5 / 24)).total_s
    assert five.compute_s == pytest.approx(rounded)
    assert rounded > even


@pytest.mark.parametrize(
    ("meanwhile", "attention", "num_parts", "exposed"),
    [
        (0, 4, 1, 8),  # all of it
        (2, 4, 1, 6),  # but for what q, k and v hide behind columns
        (9, 4, 1, 2),  # of which the output has none
        # The second halves: of q, k and v behind attention for the first, of the output for the
        # second. The link is taken by one of them at a time.
        (0, 4, 2, 5),
        (2, 4, 2, 3),
        (9, 4, 2, 1),
        (0, 80, 2, 4),
        (0, 0, 2, 8),
    ],
)
def test_transfers_hide_behind_columns_and_behind_the_other_half(
    meanwhile, attention, num_parts, exposed
):
    found = exposed_in_parts_s(8, meanwhile_s=meanwhile, attention_s=attention, num_parts=num_parts)
    assert found == pytest.approx(exposed)


def test_gathered_weights_hide_behind_compute_but_for_the_interference():
    plan, sharded = Candidate(ulysses=8), Candidate(ulysses=8, weights="sharded")
    plain, gathered = (time("8xh100", p, px=4096) for p in (plan, sharded))
    added_s = gathered.communication_s - plain.communication_s
    gather_s = 2 * (11.901e9 - 0.064e9) * 7 / 8 / 200e9 + 57 * 10e-6
    assert added_s == pytest.approx(INTERFERENCE * gather_s, rel=1e-2)


def test_gathered_weights_on_pcie_are_slower_than_one_gpu():
    gathered = time("4xl20", Candidate(ulysses=4, weights="sharded"))
    assert time("1xl20").total_s / gathered.total_s == pytest.approx(0.77, abs=0.06)


def test_weights_from_cpu_memory_are_waited_for_beyond_the_compute():
    job = {"px": 512, "execution": "compiled"}
    alone = time("1x4090", **job)
    hidden = time("1x4090", streamed_bytes=25e9 * alone.compute_s * 0.9, **job)
    late = time("1x4090", streamed_bytes=25e9 * (alone.compute_s + 0.5), **job)
    assert hidden.communication_s == 0
    assert late.communication_s == pytest.approx(0.5)


@pytest.mark.parametrize(("stages", "speedup"), [(2, 1.77), (4, 3.16), (8, 5.16)])
def test_pipefusion_has_the_bubble_of_a_barrier_in_every_step(stages, speedup):
    """The study's figures for L20; they neglect that small patches are slower."""
    pipe = time(f"{stages}xl20", Candidate(pipefusion=stages), **COMPILED)
    found = time("1xl20", **COMPILED).total_s / pipe.total_s
    assert 0.88 * speedup < found <= 1.01 * speedup
    patches = pipe.num_patches
    assert found < stages * patches / (patches + stages - 1)
    assert pipe.bubble_s == pytest.approx(pipe.compute_s * (stages - 1) / patches, rel=0.05)


def test_many_patches_are_paid_by_the_host():
    """In eager mode each patch is launched anew, so fewer patches are better on fast GPUs."""
    eager, compiled = (
        time("8xh100", Candidate(pipefusion=8), execution=name) for name in ("eager", "compiled")
    )
    assert eager.num_patches < compiled.num_patches
    assert eager.is_host_bound
    assert not compiled.is_host_bound


def test_launches_set_the_pace_of_fast_gpus_and_not_of_slow_ones():
    fast, slow = (time(f"8x{card}", Candidate(ulysses=8)) for card in ("h100", "4090"))
    assert fast.is_host_bound
    assert fast.total_s == fast.host_s == pytest.approx(57 * (66.5 + 15) * 11.2e-6)
    assert not slow.is_host_bound


def test_graphs_are_launched_at_once_where_ranks_have_weights_on_their_cards():
    plan = Candidate(ulysses=8)
    eager, replayed = (time("8xh100", plan, captures=captures) for captures in (False, True))
    assert eager.is_host_bound
    assert replayed.host_s == pytest.approx(9 * 11.2e-6)
    assert not replayed.is_host_bound
    assert replayed.compute_s == eager.compute_s
    for other in (SINGLE, Candidate(pipefusion=8), replace(plan, weights="sharded")):
        gpus = f"{other.world_size}xh100"
        assert time(gpus, other, captures=True) == time(gpus, other)


def test_a_faster_cpu_launches_faster():
    machine = replace(machine_of("8xh100"), host_call_s=3e-6)
    assert not predict(Candidate(ulysses=8), make_job(), machine).is_host_bound


def test_unequal_gpus_get_work_in_proportion():
    job = make_job(precision="fp8", **COMPILED)
    pair = machine_of("1x4090+1x3090")
    fast, slow = speeds(job, pair)
    assert 1.8 < fast / slow < 2.5
    shared = predict(Candidate(ring=2), job, pair).compute_s
    halves = predict(Candidate(ring=2), job, machine_of("2x3090")).compute_s
    alone = [compute_time(job, gpu, Part(num_rows=1)) for gpu in pair.gpus]
    fixed = [found.modulation_s + found.cast_s for found in alone]
    divided = [found.total_s - part for found, part in zip(alone, fixed, strict=True)]
    # Both are done at once, each with what no share of tokens divides, and its part of the rest.
    ideal = 1 + sum(part / rest for part, rest in zip(fixed, divided, strict=True))
    ideal /= sum(1 / rest for rest in divided)
    assert ideal < shared < 1.1 * ideal
    assert shared < 0.7 * halves


@pytest.mark.parametrize("plan", [Candidate(batch=2), Candidate(pipefusion=2)])
def test_rows_and_stages_are_shared_in_proportion_too(plan):
    job = make_job(precision="fp8", rows=3, **COMPILED)
    pair, slow = machine_of("1x4090+1x3090"), machine_of("2x3090")
    assert predict(plan, job, pair).compute_s < 0.75 * predict(plan, job, slow).compute_s


def test_all_wait_for_who_sends_most():
    """A fast card beside a slow one holds more tokens than half, and sends them."""
    job = make_job(precision="fp8", overlaps=False, **COMPILED)
    pair = predict(Candidate(ulysses=2), job, machine_of("1x4090+1x3090"))
    even = predict(Candidate(ulysses=2), job, machine_of("2x4090"))
    assert 1.2 * even.communication_s < pair.communication_s < 1.5 * even.communication_s


def test_no_rank_is_left_without_a_row():
    pair = predict(Candidate(batch=2), make_job(rows=2), machine_of("1xh100+1xrtx2000ada"))
    assert pair.compute_s == pytest.approx(time("1xrtx2000ada").compute_s)


def test_tensor_parallelism_sends_less_than_it_computes_less():
    """2 L20: 1.61x published."""
    one, two = time("1xl20", text=512), time("2xl20", Candidate(tensor=2), text=512)
    assert one.total_s / two.total_s == pytest.approx(1.61, rel=0.05)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_transfers_in_8_bits_take_17_bytes_of_32_and_kernels_of_their_own(dtype):
    machine, plan = machine_of("4x4090"), Candidate(ulysses=4)
    exact, narrow = (
        predict(plan, make_job(overlaps=False, transfer_dtype=each), machine)
        for each in ("exact", dtype)
    )
    # 4352 tokens of 3072 features on 4 ranks, 57 blocks; 12 GB/s of which four leave 0.8.
    values = 4 * 57 * 4352 * 3072 / 4
    saved_s = values * 3 / 4 * (2 - 136 / 128) / (12e9 * 0.8)
    took_s = values * QUANTISE_BYTES / 1008e9
    assert exact.communication_s - narrow.communication_s == pytest.approx(saved_s - took_s)
    calls = 57 * 2 * EAGER.calls_per_quantised
    assert narrow.host_s - exact.host_s == pytest.approx(calls * machine.host_call_s)
    assert narrow.compute_s == exact.compute_s


@pytest.mark.parametrize(
    "plan", [Candidate(ring=4), Candidate(tensor=4), Candidate(pipefusion=2, ulysses=2), SINGLE]
)
def test_a_plan_that_exchanges_no_heads_takes_as_long_in_8_bits(plan):
    machine = machine_of("4x4090").first(plan.world_size)
    exact, narrow = (
        predict(plan, make_job(transfer_dtype=dtype), machine) for dtype in ("exact", "int8")
    )
    assert narrow == exact

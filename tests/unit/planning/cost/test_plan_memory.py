"""What plans take on a card."""

from __future__ import annotations

import pytest
from rig.published import make_job

from comfy_xdit_patch.planning.cost.candidate import SINGLE, Candidate
from comfy_xdit_patch.planning.cost.choice import need, streamed_bytes
from comfy_xdit_patch.planning.cost.cost import _parts
from comfy_xdit_patch.planning.cost.known_machines import machine_of
from comfy_xdit_patch.planning.cost.rank_time import Part, compute_time
from comfy_xdit_patch.planning.residency import GIB

BLOCKS = 2 * (11_901_408_320 - 64_124_992)
OUTSIDE = 2 * 64_124_992


def costs(plan, gpus="4xl20", **job):
    found = need(plan, make_job(**job), machine_of(gpus))
    return {cost.what: cost.num_bytes for cost in found.costs}


@pytest.mark.parametrize("plan", [Candidate(pipefusion=4), Candidate(tensor=4)])
def test_stages_and_columns_divide_the_blocks(plan):
    assert costs(plan)["weights"] == OUTSIDE + BLOCKS // 4


def test_sharing_tokens_does_not_divide_the_weights():
    assert costs(Candidate(ulysses=4))["weights"] == OUTSIDE + BLOCKS


def test_sharded_weights_are_those_of_the_doctor():
    assert (
        costs(Candidate(ulysses=4, weights="sharded"))["1/4 of the blocks' weights"] == BLOCKS // 4
    )


def test_pipefusion_keeps_keys_and_values_of_its_stage():
    whole = 2 * 57 * 4352 * 3072 * 2
    kept = costs(Candidate(pipefusion=4))["keys and values of the step before"]
    assert kept == pytest.approx(whole / 4, rel=0.06)  # 15 of 57 blocks
    both = costs(Candidate(pipefusion=2, ulysses=2))["keys and values of the step before"]
    assert both == pytest.approx(whole / 4, rel=0.06)
    assert "keys and values of the step before" not in costs(Candidate(ulysses=4))


def test_the_host_has_a_context_where_workers_compute():
    context = "CUDA context of ComfyUI's own process"
    assert context in costs(Candidate(ulysses=4))
    assert context not in costs(SINGLE, gpus="1xl20")


def activations(plan):
    found = costs(plan, rows=4)
    what = next(what for what in found if what.startswith("activations"))
    return what.removeprefix("activations, "), found[what]


def test_a_rank_holds_its_own_rows_and_of_each_its_own_tokens():
    rows, both, tokens = (
        activations(plan)
        for plan in (Candidate(batch=4), Candidate(batch=2, ulysses=2), Candidate(ulysses=4))
    )
    assert rows[0] == "4352 of 4352 tokens"
    assert both[0] == "2176 of 4352 tokens"
    assert tokens[0] == "1088 of 4352 tokens"
    embedded = 4352 * 3072 * 2
    assert tokens[1] - rows[1] == 3 * embedded, "of the rows that others have, nothing is embedded"
    assert tokens[1] - both[1] == 2 * embedded


def test_one_gpu_streams_what_does_not_fit():
    job, card = make_job("flux2-dev"), machine_of("1x4090")
    overflow = need(SINGLE, job, card).num_bytes - card.gpus[0].memory_bytes
    assert streamed_bytes(SINGLE, job, card) == overflow
    assert overflow / GIB == pytest.approx(39, abs=1)
    assert streamed_bytes(SINGLE, make_job(), machine_of("1xl20")) == 0


def test_workers_that_offload_stream_all_blocks():
    plan = Candidate(ulysses=2, weights="offload")
    assert streamed_bytes(plan, make_job(), machine_of("2x4090")) == BLOCKS
    assert streamed_bytes(Candidate(ulysses=2), make_job(), machine_of("2xl20")) == 0


def test_cut_blocks_hold_all_tokens_that_they_compute():
    both = [costs(plan) for plan in (Candidate(ulysses=2), Candidate(ulysses=2, tensor=2))]
    assert both[0].pop("weights") > both[1].pop("weights")
    one, three = both[0].pop("NCCL, 1 group(s)"), both[1].pop("NCCL, 3 group(s)")
    assert three == 3 * one, "of all ranks, of the sequence and of the cuts"
    assert both[0] == both[1]


@pytest.mark.parametrize(("num_ranks", "gb"), [(2, 3.23), (4, 1.61), (8, 0.81)])
def test_of_flux1s_modulation_a_rank_holds_and_reads_its_part(num_ranks, gb):
    plan = Candidate(ulysses=num_ranks, weights="modulation")
    held = costs(plan, gpus=f"{num_ranks}x4090")
    part = held[f"1/{num_ranks} of the blocks' modulation"]
    assert part / 1e9 == pytest.approx(gb, abs=0.005)
    assert held["weights but for the blocks' modulation"] + num_ranks * part == OUTSIDE + BLOCKS
    gpu = machine_of("1x4090").gpus[0]
    times = [compute_time(make_job(), gpu, Part(1, modulation=n)) for n in (1, 1 / num_ranks)]
    assert times[1].modulation_s * gpu.memory_bytes_per_s == pytest.approx(part)
    assert times[0].total_s - times[1].total_s == pytest.approx(
        times[0].modulation_s - times[1].modulation_s
    )


@pytest.mark.parametrize(
    ("plan", "part"),
    [
        (Candidate(ulysses=4, weights="modulation"), 1 / 4),
        (Candidate(batch=2, ulysses=2, weights="modulation"), 2 / 4),
        (Candidate(batch=4, weights="modulation"), 1),
        (Candidate(ulysses=4), 1),
    ],
)
def test_a_rank_reads_its_modulation_once_for_each_part_of_the_batch(plan, part):
    parts = _parts(plan, make_job(rows=4), [1.0] * 4)
    assert {found.modulation for found in parts} == {part}

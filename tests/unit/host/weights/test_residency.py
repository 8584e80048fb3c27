"""Shares of unequal ranks must not push weights off the cards."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from comfy_xdit_patch.host.weights.residency import Residency, model_sizes
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.residency import GIB, MIB, ModelSizes
from comfy_xdit_patch.settings import read_settings
from comfy_xdit_patch.wire.messages.requests import Residence

IMAGE = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=65280, num_heads=24)
SIZES = ModelSizes(
    total_bytes=22 * GIB, largest_block_bytes=650 * MIB, outside_blocks_bytes=128 * MIB
)
EVEN, UNEQUAL = ParallelPlan(ulysses=2), ParallelPlan(ulysses=2, weights=(3, 1))
DTYPE = torch.bfloat16


class Model:
    """A BaseModel, as far as its memory is planned."""

    diffusion_model = types.SimpleNamespace(
        hidden_size=3072, double_blocks=[None] * 19, single_blocks=[None] * 38
    )


def residency(gib):
    joined = {rank: types.SimpleNamespace(rank=rank, total_bytes=0) for rank in range(2)}
    crew = types.SimpleNamespace(world_size=2, joined=joined)
    settings = read_settings({"XDIT_GPU_MEMORY": str(gib)} if gib else {})
    made, model = Residency(crew, budget_bytes=settings.gpu_memory_bytes), Model()
    made._sizes[model] = SIZES
    return made, model


@pytest.mark.parametrize(
    ("gib", "has_room"),
    [(80, True), (30.5, False), (26, True), (2, True), (None, True)],
    ids=["whole anyway", "whole if even", "sharded anyway", "never", "CPU ranks"],
)
def test_larger_shares_have_room_where_weights_lie_as_with_even_ones(gib, has_room):
    made, model = residency(gib)
    assert made.has_room_for_shares(model, IMAGE, UNEQUAL, DTYPE) == has_room
    assert made.has_room_for_shares(model, IMAGE, EVEN, DTYPE)


CUT = ParallelPlan(tensor=2)


@pytest.mark.parametrize(
    ("gib", "plan", "is_resident"),
    [
        (80, EVEN, True),
        (None, EVEN, True),
        (26, EVEN, False),
        (2, EVEN, False),
        (26, CUT, True),
        (None, CUT, True),
        (16, CUT, False),
    ],
)
def test_weights_are_resident_if_what_a_rank_computes_with_lies_on_its_card(gib, plan, is_resident):
    made, model = residency(gib)
    assert made.is_resident(model, IMAGE, plan, DTYPE) == is_resident
    assert made.arithmetic == [], "nothing is decided by the question"


def test_a_model_that_was_sharded_once_is_not_whole_any_more():
    made, model = residency(80)
    made.place(model, IMAGE, EVEN, DTYPE, first="sharded")
    assert not made.is_resident(model, IMAGE, EVEN, DTYPE)
    assert made.is_resident(model, IMAGE, CUT, DTYPE)


def test_weights_are_counted_in_the_dtype_that_a_dynamic_host_computes_with():
    """ComfyUI's weight_dtype=fp8 on a bf16 file: half of what lies in the host's memory."""
    flux = torch.nn.Module()
    flux.double_blocks = torch.nn.ModuleList([torch.nn.Linear(8, 4, dtype=torch.bfloat16)])
    flux.img_in = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    for layer in (flux.double_blocks[0], flux.img_in):
        layer.weight_comfy_model_dtype = layer.bias_comfy_model_dtype = torch.float8_e4m3fn
    patcher = types.SimpleNamespace(is_dynamic=lambda: True, backup={})
    sizes = model_sizes(
        types.SimpleNamespace(diffusion_model=flux, current_patcher=patcher), torch.bfloat16
    )
    assert sizes == ModelSizes(
        total_bytes=40, largest_block_bytes=36, outside_blocks_bytes=4, cast_bytes=64
    )


WITH_MODULATION = dataclasses.replace(SIZES, modulation_bytes=6 * GIB)


@pytest.mark.parametrize(
    ("gib", "sizes", "first", "mode"),
    [
        (80, WITH_MODULATION, "full", "full"),
        (28, WITH_MODULATION, "full", "modulation"),
        (20, WITH_MODULATION, "full", "sharded"),
        (80, WITH_MODULATION, "modulation", "modulation"),
        (None, WITH_MODULATION, "modulation", "modulation"),
        (28, SIZES, "full", "sharded"),
        (80, SIZES, "modulation", "full"),
        (None, SIZES, "modulation", "full"),
    ],
)
def test_modulation_is_shared_where_only_that_fits_or_it_is_asked_for(gib, sizes, first, mode):
    made, model = residency(gib)
    made._sizes[model] = sizes
    place = made.place(model, IMAGE, EVEN, DTYPE, first=first)
    assert place.residence == Residence(mode)
    assert made.is_resident(model, IMAGE, EVEN, DTYPE) == (mode in ("full", "modulation"))


IN_FP8 = ModelSizes(
    total_bytes=11 * GIB,
    largest_block_bytes=325 * MIB,
    outside_blocks_bytes=64 * MIB,
    modulation_bytes=3 * GIB,
    as_cast=WITH_MODULATION,
)


@pytest.mark.parametrize(
    ("gib", "first", "mode"),
    [
        (80, "modulation", "cast"),
        (20, "modulation", "modulation"),
        (None, "modulation", "modulation"),
        (80, "full", "full"),
    ],
)
def test_weights_are_cast_once_by_name_where_memory_is_counted_and_has_room(gib, first, mode):
    made, model = residency(gib)
    made._sizes[model] = IN_FP8
    assert made.place(model, IMAGE, EVEN, DTYPE, first=first).residence == Residence(mode)
    assert made.is_resident(model, IMAGE, EVEN, DTYPE)


def test_weights_that_had_to_be_as_stored_once_stay_so_and_are_counted_so():
    made, model = residency(80)
    made._sizes[model] = IN_FP8
    asked = model, IMAGE, EVEN, DTYPE
    cast = made.place(*asked, first="modulation")
    stored = made.place(*asked, first="modulation", may_cast=False)
    assert (cast.residence, stored.residence) == (Residence("cast"), Residence("modulation"))
    assert made.place(*asked, first="modulation") == stored
    assert stored.needed_bytes < cast.needed_bytes


def test_larger_shares_may_have_the_modulation_shared():
    made, model = residency(30.5)
    assert not made.has_room_for_shares(model, IMAGE, UNEQUAL, DTYPE)
    made._sizes[model] = WITH_MODULATION
    assert made.has_room_for_shares(model, IMAGE, UNEQUAL, DTYPE)


def flux_with_modulation(weight):
    """One single block of 12 features of modulation, and another linear of the same size."""
    flux = torch.nn.Module()
    block, modulation = torch.nn.Module(), torch.nn.Module()
    modulation.lin, block.linear1 = torch.nn.Linear(4, 12), torch.nn.Linear(4, 12)
    modulation.lin._parameters["weight"] = weight
    block.modulation = modulation
    flux.single_blocks = torch.nn.ModuleList([block])
    return flux


class Grouped(torch.Tensor):
    """A weight of a class that cannot be cut, as GGUF's."""


@pytest.mark.parametrize(
    ("weight", "extra", "num_bytes"),
    [
        (torch.zeros(12, 4), {}, 4 * (12 * 4 + 12)),
        (torch.zeros(12, 4, dtype=torch.float8_e4m3fn), {}, 12 * 4 + 4 * 12),
        (torch.zeros(12, 4), {"scale_weight": torch.ones(1)}, 4 * (12 * 4 + 12 + 1)),
        (torch.zeros(12, 4), {"scale_weight": torch.ones(12)}, 0),
        (torch.zeros(12, 4, dtype=torch.uint8), {}, 0),
        (torch.zeros(12, 4).as_subclass(Grouped), {}, 0),
    ],
)
def test_modulation_is_counted_where_it_can_be_cut(weight, extra, num_bytes):
    flux = flux_with_modulation(torch.nn.Parameter(weight, requires_grad=False))
    flux.single_blocks[0].modulation.lin._parameters.update(
        {name: torch.nn.Parameter(value) for name, value in extra.items()}
    )
    if type(weight) is Grouped:
        flux.single_blocks[0].modulation.lin._parameters["weight"] = weight
    patcher = types.SimpleNamespace(backup={})
    model = types.SimpleNamespace(diffusion_model=flux, current_patcher=patcher)
    assert model_sizes(model, torch.float32).modulation_bytes == num_bytes

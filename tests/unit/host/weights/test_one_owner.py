"""Whose turn it is on a GPU that ComfyUI and a worker share. Memory is a figure here, in GiB."""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from types import SimpleNamespace

import pytest

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.weights import one_owner as patching_memory
from comfy_xdit_patch.host.weights.held import Held, RemoteWeights
from comfy_xdit_patch.host.weights.one_owner import SharedMemory, nothing_pinned
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.requests import Residence

GPU = SimpleNamespace(type="cuda", index=0)
CPU = SimpleNamespace(type="cpu", index=None)
FLUX = 7
"""Number of the model that the workers hold."""


@pytest.fixture
def comfyui(monkeypatch):
    """ComfyUI's figures; ``asked`` is what it was asked to free, in GiB."""
    package, management = types.ModuleType("comfy"), types.ModuleType("comfy.model_management")
    package.model_management = management
    management.free = 4
    management.asked = []
    management.get_free_memory = lambda _: management.free
    management.minimum_inference_memory = lambda: 1
    management.extra_reserved_memory = lambda: 0.5
    management.current_loaded_models = []
    management.free_memory = lambda needed, _, keep_loaded: management.asked.append(needed)
    management.MAX_PINNED_MEMORY = 100
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    return management


@pytest.fixture
def memory(monkeypatch):
    """Two GPUs, rank 0 on that of ComfyUI."""
    gpus = tuple(Device(f"card {i}", f"GPU-{i}") for i in range(2))
    monkeypatch.setattr(patching_memory, "visible_gpus", lambda: gpus)
    return SharedMemory(gpus)


@pytest.fixture
def weights():
    """Ranks that hold a model and a ControlNet; nothing is asked of them."""
    crew = SimpleNamespace(world_size=2, packs=None)
    made = RemoteWeights(crew, totals=Totals(), models=None, failed={}, verifies=False)
    made.may_hold_any = True
    made.held = {FLUX: Held("", Residence(), (12, 12)), 8: Held("", Residence(), (12, 11))}
    made.crew = SimpleNamespace(
        turn=lambda _: contextlib.nullcontext(SimpleNamespace(number=1, ask=lambda _: []))
    )
    return made


def patcher(size=12, loaded=0, device=GPU):
    return SimpleNamespace(
        load_device=device, model_size=lambda: size, loaded_size=lambda: loaded, model=object()
    )


@pytest.mark.parametrize(
    ("required", "computing", "for_dynamic", "gives_way"),
    [
        (12, 0, False, True),  # all of a text encoder, as ComfyUI without dynamic VRAM loads it
        (4, 0, False, False),
        (12, 0, True, False),  # its weights pass through the 4 GiB that are free
        (12, 3, True, False),
        (12, 5, True, True),  # a VAE computes with more than is free
        (12, 3.6, True, True),  # with what ComfyUI keeps free besides
        (4.5, None, True, True),  # nobody knows what it is for
        (1e29, 0, True, False),
    ],
)
def test_a_worker_gives_way_to_what_cannot_do_with_the_room_that_there_is(
    comfyui, memory, weights, required, computing, for_dynamic, gives_way
):
    with memory.loading(computing):
        ranks = memory.is_wanted(weights, required, GPU, for_dynamic=for_dynamic)
    assert ranks == ([0] if gives_way else [])


def test_comfyui_computes_with_something_at_least(comfyui, memory, weights):
    comfyui.free = 0.9
    with memory.loading(0):
        assert memory.is_wanted(weights, 12, GPU, for_dynamic=True) == [0]
    assert memory.is_wanted(weights, 12, CPU, for_dynamic=True) == []


def test_a_worker_that_gave_way_is_given_room_for_all_of_a_model_once(comfyui, memory, weights):
    """It takes 16 GiB to run the model, of which 12 lie on its card if it has not given way."""
    run = SimpleNamespace(current_patcher=patcher())
    steps = [
        ("is held", lambda: None, 4),
        ("gave way", lambda: weights.give_way(weights.crew, [0]), 16),
        ("has returned", lambda: None, 4),
    ]
    for what, happens, needed in steps:
        happens()
        memory.make_room_for_workers(weights, run, 16, held=FLUX)
        assert comfyui.asked.pop() == needed, what
    memory.make_room_for_workers(weights, run, 16)
    assert comfyui.asked == [16], "a model that no worker holds"


def test_a_worker_that_gave_way_is_not_asked_again_before_it_returns(comfyui, memory, weights):
    comfyui.free = 0
    weights.give_way(weights.crew, memory.is_wanted(weights, 12, GPU, for_dynamic=False))
    assert memory.is_wanted(weights, 12, GPU, for_dynamic=False) == []
    memory.make_room_for_workers(weights, SimpleNamespace(current_patcher=patcher()), 16)
    assert memory.is_wanted(weights, 12, GPU, for_dynamic=False) == [0]


def test_what_a_model_needs_is_known_by_its_number(comfyui, memory, weights):
    """A ControlNet returns first; the model, which gave way with it, still needs its room."""
    weights.give_way(weights.crew, [0])
    run = SimpleNamespace(current_patcher=patcher())
    for number in (8, FLUX, FLUX):
        memory.make_room_for_workers(weights, run, 16, weakref.WeakSet(), held=number)
    assert comfyui.asked == [16, 16, 4]


@pytest.mark.parametrize(
    ("free", "loaded", "fits"), [(13, 0, True), (12.5, 0, False), (5, 8, True), (4.5, 8, False)]
)
def test_comfyui_is_timed_alone_only_where_its_copy_fits_beside_the_workers(
    comfyui, memory, free, loaded, fits
):
    comfyui.free = free
    assert memory.fits_beside_worker(patcher(loaded=loaded)) == fits
    assert memory.fits_beside_worker(patcher(device=CPU)), "CPU ranks share no GPU with it"


def test_comfyui_pins_nothing_of_a_copy_that_is_held_back(comfyui):
    with nothing_pinned():
        assert comfyui.MAX_PINNED_MEMORY == 0
    assert comfyui.MAX_PINNED_MEMORY == 100

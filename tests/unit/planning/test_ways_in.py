"""What may keep a call of a model from coming to ``_forward``, and who did it."""

from __future__ import annotations

import functools
import types

import pytest

from comfy_xdit_patch.planning.ways_in import WaysIn

HERE = __name__


@pytest.fixture
def world():
    class Flux:
        def forward(self):
            pass

        def _forward(self):
            pass

    Flux.__module__ = "comfy.ldm.flux.model"
    module = types.ModuleType("comfy.ldm.flux.model")
    module.Flux = Flux
    ways = WaysIn({module.__name__: module})
    return types.SimpleNamespace(cls=Flux, flux=Flux(), ways=ways)


def another(self):
    pass


def wrapping(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def test_comfyuis_own_ways_and_ours_are_no_obstacle(world):
    assert world.ways.obstacle(world.flux) is None
    world.cls._forward = wrapping(world.cls._forward)
    assert world.ways.obstacle(world.flux) is None
    world.flux.forward = world.flux.forward  # what an object patch leaves behind
    assert world.ways.obstacle(world.flux) is None


@pytest.mark.parametrize("name", ["forward", "_forward"])
def test_a_function_in_the_way_is_named(world, name):
    setattr(world.cls, name, another)
    reason = f"the model's class has a {name} of its own: {HERE}.another"
    assert world.ways.obstacle(world.flux).reason == reason
    setattr(world.flux, name, functools.partial(another, None))
    reason = f"a node put a {name} of its own on the whole model: {HERE}.another"
    assert world.ways.obstacle(world.flux).reason == reason
    assert world.ways.obstacle(world.flux).is_around_blocks


def test_a_class_made_from_comfyuis_is_of_the_family_and_a_controlnet_is_not(world):
    own = type("Own", (world.cls,), {})
    control = type("ControlNetFlux", (world.cls,), {"__module__": "comfy.ldm.flux.controlnet"})
    assert world.ways.class_of(own()) is world.cls
    assert world.ways.obstacle(own()) is None
    assert world.ways.class_of(control()) is None
    assert world.ways.class_of(object()) is None

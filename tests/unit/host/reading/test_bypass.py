"""Which forwards are ComfyUI's own bypass LoRAs, and which somebody else's."""

from __future__ import annotations

import types
from types import SimpleNamespace

import pytest

from comfy_xdit_patch.host.reading.eligibility import MODULE, BypassCode


class BypassForwardHook:
    """As ComfyUI's: takes the place of a forward, and calls it."""

    def __init__(self, module):
        self.module = module
        self.original_forward = None

    def _bypass_forward(self, x):
        return self.original_forward(x)

    def inject(self):
        self.original_forward = self.module.forward
        self.module.forward = self._bypass_forward


class BypassInjectionManager:
    """As ComfyUI's: its injection is a closure."""

    def create_injections(self, hooks):
        def inject_all(_):
            for hook in hooks:
                hook.inject()

        return [SimpleNamespace(inject=inject_all)]


class Layer:
    def forward(self, x):
        return x


class Flux(Layer):
    def __init__(self, layer):
        self.layer = layer

    def named_modules(self):
        yield "", self
        yield "blocks.0._orig_mod.layer", self.layer


def another(x):
    return -x


@pytest.fixture
def bypass():
    module = types.ModuleType(MODULE)
    module.BypassForwardHook = BypassForwardHook
    module.BypassInjectionManager = BypassInjectionManager
    return BypassCode({MODULE: module})


def test_hooks_are_found_the_innermost_first(bypass):
    layer = Layer()
    hooks = [BypassForwardHook(layer), BypassForwardHook(layer)]
    for hook in hooks:
        hook.inject()
    assert bypass.hooks_on(layer) == hooks
    assert bypass.hooks_of(Flux(layer)) == {"blocks.0.layer": hooks}


def test_a_layer_as_it_was_or_put_back_has_none(bypass):
    layer = Layer()
    assert bypass.hooks_on(layer) == []
    layer.forward = layer.forward
    assert bypass.hooks_on(layer) == []
    assert bypass.hooks_of(Flux(layer)) == {}


@pytest.mark.parametrize("is_hooked_first", [True, False])
def test_somebody_elses_forward_around_or_beneath_is_noticed(bypass, is_hooked_first):
    layer = Layer()
    if is_hooked_first:
        BypassForwardHook(layer).inject()
    layer.forward = another
    if not is_hooked_first:
        BypassForwardHook(layer).inject()
    assert bypass.hooks_on(layer) is None


def test_a_hook_that_calls_itself_or_is_another_layers_is_not_carried(bypass):
    layer, other = Layer(), Layer()
    hook = BypassForwardHook(layer)
    hook.inject()
    hook.inject()
    assert bypass.hooks_on(layer) is None
    stray = BypassForwardHook(layer)
    stray.original_forward = other.forward
    other.forward = stray._bypass_forward
    assert bypass.hooks_on(other) is None


def test_injections_are_known_by_their_code(bypass):
    (own,) = BypassInjectionManager().create_injections([])
    assert bypass.makes(own)
    assert not bypass.makes(SimpleNamespace(inject=another))


def test_without_that_code_nothing_is_a_bypass_lora():
    layer = Layer()
    BypassForwardHook(layer).inject()
    bypass = BypassCode({})
    assert bypass.hooks_on(layer) is None
    assert not bypass.makes(SimpleNamespace(inject=another))

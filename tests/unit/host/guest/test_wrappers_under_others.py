"""Our wrapper under a plain function that another extension put in its place."""

from __future__ import annotations

import gc
import weakref
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
import wrapt

from comfy_xdit_patch.host.guest.between import Between
from comfy_xdit_patch.host.guest.wrappers import Wrappers


class Host:
    """A host that refuses every call, and notes how it was bound."""

    settings = SimpleNamespace(strict=True)
    hooks = SimpleNamespace(make_up=lambda: None)

    def __init__(self):
        self.seen = []
        self.is_inside = ContextVar("is_inside", default=False)

    def forward(self, flux, arguments, compute):
        self.seen.append({**arguments, "computed": compute()})


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def flux_class(host):
    """Return a class whose method we wrap first, and somebody else then."""

    class Flux:
        def _forward(self, x, timestep=0, **kwargs):
            return x + timestep

    wrapt.wrap_object(
        Flux, "_forward", wrapt.FunctionWrapper, (Wrappers(host, Between()).flux_forward,)
    )
    ours = Flux._forward

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    Flux._forward = theirs
    return Flux


def test_arguments_are_named_as_without_it(host, flux_class):
    assert flux_class()._forward(1, timestep=2, extra=3) == 3
    assert host.seen == [{"x": 1, "timestep": 2, "extra": 3, "computed": 3}]


def test_no_model_is_kept(flux_class):
    models = [flux_class() for _ in range(3)]
    references = [weakref.ref(model) for model in models]
    for model in models:
        model._forward(1)
    del model
    models.clear()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3

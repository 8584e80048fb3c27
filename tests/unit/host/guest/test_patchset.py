"""All or none, reversible, and at peace with other people's wrappers."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
import wrapt

from comfy_xdit_patch.host.guest.patchset import DYNAMO_MARK, PatchPoint, PatchSet

SOURCE = '''
class Sampler:
    """A class of ComfyUI."""

    def sample(self, noise, sigmas, seed=0):
        return ("stock", noise, sigmas, seed)

    def other(self, noise):
        return ("stock", noise)


def load(path, *, options=None):
    return ("stock", path, options)


def loose(*args, **kwargs):
    return ("stock", args, kwargs)
'''


@pytest.fixture
def comfy(monkeypatch):
    """Return a module that stands for one of ComfyUI's."""
    module = types.ModuleType("pretended_comfy")
    exec(SOURCE, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def ours(wrapped, instance, args, kwargs):
    return ("ours", *wrapped(*args, **kwargs))


def point(attribute, *parameters, wrapper=ours, module="pretended_comfy"):
    return PatchPoint(module, attribute, wrapper, frozenset(parameters), "a test")


def both(wrapper=ours):
    return PatchSet(
        [
            point("Sampler.sample", "noise", "sigmas", wrapper=wrapper),
            point("load", "path", "options", wrapper=wrapper),
        ]
    )


def test_methods_and_functions_are_wrapped_and_called_through_after_uninstall(comfy):
    patch_set = both()
    assert patch_set.install() is None
    assert patch_set.active
    assert comfy.Sampler().sample(1, 2, seed=3) == ("ours", "stock", 1, 2, 3)
    assert comfy.load("x") == ("ours", "stock", "x", None)
    patch_set.uninstall()
    assert not patch_set.active
    assert comfy.Sampler().sample(1, 2, seed=3) == ("stock", 1, 2, 3)
    assert comfy.load("x", options=4) == ("stock", "x", 4)


def test_what_only_notes_goes_on_noting_while_the_rest_is_switched_off(comfy):
    noting = PatchPoint(comfy.__name__, "load", ours, frozenset(), "a test", only_notes=True)
    patch_set = PatchSet([point("Sampler.sample"), noting])
    patch_set.install()
    patch_set.uninstall()
    assert comfy.Sampler().sample(1, 2, seed=3) == ("stock", 1, 2, 3)
    assert comfy.load("x") == ("ours", "stock", "x", None)


def test_the_wrapper_gets_the_instance_and_the_arguments_as_they_were_passed(comfy):
    seen = []

    def spy(wrapped, instance, args, kwargs):
        seen.append((instance, args, kwargs))
        return wrapped(*args, **kwargs)

    both(spy).install()
    sampler = comfy.Sampler()
    sampler.sample(1, sigmas=2)
    comfy.load("x")
    assert seen == [(sampler, (1,), {"sigmas": 2}), (None, ("x",), {})]


def test_subclasses_and_instances_made_earlier_are_reached_too(comfy):
    class Derived(comfy.Sampler):
        def sample(self, noise, sigmas, seed=0):
            return ("derived", *super().sample(noise, sigmas, seed))

    early = comfy.Sampler()
    both().install()
    assert early.sample(1, 2)[0] == "ours"
    assert Derived().sample(1, 2)[:2] == ("derived", "ours")


def test_only_the_named_attributes_are_touched(comfy):
    cls, other, loose = comfy.Sampler, comfy.Sampler.__dict__["other"], comfy.loose
    both().install()
    assert comfy.Sampler is cls
    assert comfy.Sampler.__dict__["other"] is other
    assert comfy.loose is loose


def test_a_wrapped_function_looks_like_the_original(comfy):
    signature = inspect.signature(comfy.load)
    both().install()
    assert inspect.signature(comfy.load) == signature
    assert comfy.load.__name__ == "load"


@pytest.mark.parametrize(
    ("bad", "misfit"),
    [
        (point("Sampler.sample", "noise", "guider"), "Sampler.sample has no parameter guider"),
        (point("load", "z", "path", "a"), "load has no parameter a, z"),
        (point("loose", "noise"), "loose has no parameter noise"),
        (point("Sampler.absent"), "Sampler.absent is missing"),
        (point("Absent.sample"), "Absent.sample is missing"),
        (point("run", module="pretended_comfy_absent"), "pretended_comfy_absent.run is missing"),
    ],
)
@pytest.mark.parametrize("bad_comes_first", [True, False])
def test_one_point_that_does_not_fit_keeps_all_of_them_out(comfy, bad, misfit, bad_comes_first):
    before = (comfy.Sampler.__dict__["sample"], comfy.load)
    good = [point("Sampler.sample", "noise"), point("load", "path")]
    patch_set = PatchSet([bad, *good] if bad_comes_first else [*good, bad])
    assert misfit in patch_set.install()
    assert not patch_set.active
    assert (comfy.Sampler.__dict__["sample"], comfy.load) == before
    assert comfy.load("x") == ("stock", "x", None)


def test_installing_twice_wraps_once(comfy):
    patch_set = both()
    patch_set.install()
    wrapped = comfy.load
    assert patch_set.install() is None
    assert comfy.load is wrapped
    assert comfy.load("x") == ("ours", "stock", "x", None)


def test_uninstalling_first_or_twice_does_nothing(comfy):
    patch_set = both()
    patch_set.uninstall()
    patch_set.install()
    patch_set.uninstall()
    patch_set.uninstall()
    assert comfy.load("x") == ("stock", "x", None)


def test_a_set_can_be_installed_again(comfy):
    patch_set = both()
    for _ in range(3):
        assert patch_set.install() is None
        assert comfy.load("x") == ("ours", "stock", "x", None)
        patch_set.uninstall()
        assert comfy.load("x") == ("stock", "x", None)


def theirs_by_assignment(comfy):
    below = comfy.load

    def load(*args, **kwargs):
        return ("theirs", *below(*args, **kwargs))

    comfy.load = load


def theirs_by_wrapt(comfy):
    wrapt.wrap_function_wrapper(
        comfy, "load", lambda wrapped, _, args, kwargs: ("theirs", *wrapped(*args, **kwargs))
    )


@pytest.mark.parametrize("wrap", [theirs_by_assignment, theirs_by_wrapt])
def test_uninstall_keeps_a_wrapper_that_somebody_put_on_top(comfy, wrap):
    patch_set = both()
    patch_set.install()
    wrap(comfy)
    top = comfy.load
    assert comfy.load("x") == ("theirs", "ours", "stock", "x", None)
    patch_set.uninstall()
    assert comfy.load is top
    assert comfy.load("x") == ("theirs", "stock", "x", None)
    patch_set.install()
    assert comfy.load is top
    assert comfy.load("x") == ("theirs", "ours", "stock", "x", None)


@pytest.mark.parametrize("wrap", [theirs_by_wrapt])
def test_a_wrapper_that_was_there_before_stays_below_ours(comfy, wrap):
    wrap(comfy)
    patch_set = both()
    assert patch_set.install() is None
    assert comfy.load("x") == ("ours", "theirs", "stock", "x", None)
    patch_set.uninstall()
    assert comfy.load("x") == ("theirs", "stock", "x", None)


@pytest.mark.parametrize("wrap", [None, theirs_by_wrapt])
def test_dynamo_is_kept_out_of_marked_originals_while_the_set_is_active(comfy, wrap):
    original, unmarked = comfy.load, comfy.loose
    if wrap is not None:
        wrap(comfy)
    patch_set = PatchSet(
        [
            PatchPoint("pretended_comfy", "load", ours, frozenset(), "", hidden_from_dynamo=True),
            point("loose"),
        ]
    )
    patch_set.install()
    assert original._torchdynamo_disable
    assert not hasattr(unmarked, "_torchdynamo_disable")
    patch_set.uninstall()
    assert not getattr(original, "_torchdynamo_disable", False)


def test_the_mark_for_dynamo_is_the_one_that_torch_itself_sets():
    @torch.compiler.disable
    def marked():
        pass

    assert getattr(marked, DYNAMO_MARK) is True


def test_an_exception_of_the_original_passes_unchanged(comfy):
    error = RuntimeError("interrupted")

    def broken(path, *, options=None):
        raise error

    comfy.load = broken
    both().install()
    with pytest.raises(RuntimeError, match="interrupted") as caught:
        comfy.load("x")
    assert caught.value is error

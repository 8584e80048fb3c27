"""Every wrapper calls ComfyUI's own function once, whatever becomes of us."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace

import pytest

from comfy_xdit_patch.errors import FallBackError
from comfy_xdit_patch.host.guest.between import Between
from comfy_xdit_patch.host.guest.wrappers import Wrappers
from comfy_xdit_patch.host.weights.one_owner import NEXT_TO_NOTHING, LeftOutHooks
from comfy_xdit_patch.report.log import warn_once

pytestmark = pytest.mark.usefixtures("interrupt")


class Run:
    """A run of a model that is no FLUX."""

    is_flux = False

    def __str__(self):
        return "run"


class Host:
    """A host that notes what it is told and answers a forward."""

    def __init__(self, *, answer=None, strict=False):
        self.settings = SimpleNamespace(strict=strict)
        self.base_model = ContextVar("base_model", default=None)
        self.current_run = ContextVar("current_run", default=None)
        self.is_inside = ContextVar("is_inside", default=False)
        ways = SimpleNamespace(obstacle=lambda flux: None, class_of=lambda flux: None)
        self.pristine = SimpleNamespace(ways=ways)
        self.answer = answer
        self.is_held_back = False
        self.hooks = LeftOutHooks()
        self.leaves_out = True
        self.pool = SimpleNamespace(start=lambda: self.seen.append("start"))
        self.seen = []
        self.memory = SimpleNamespace(loading=self.loading)

    @contextmanager
    def loading(self, computing_bytes):
        self.seen.append(("loading", computing_bytes))
        yield

    def forward(self, flux, arguments, compute):
        self.seen.append((flux, arguments))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def leaves_out_hooks(self, patcher):
        return self.leaves_out and self.hooks.may_be_left_out

    def begin_run(self, patcher):
        self.seen.append("begin")
        return Run()

    def end_run(self, run):
        self.seen.append(f"end of {run}")

    def model_loaded(self, patcher, loader, path, options, file):
        self.seen.append((patcher, loader, path, options))

    def is_flux(self, patcher):
        return True

    def free(self, required, device, *, for_dynamic):
        self.seen.append(("free", required, device, for_dynamic))

    def holds_back(self, patcher):
        return self.is_held_back


class FaultyHost(Host):
    """Everything that it is asked to do fails."""

    def forward(self, flux, arguments, compute):
        raise RuntimeError("planted")

    @property
    def ways(self):
        raise RuntimeError("planted")

    @ways.setter
    def ways(self, _):
        pass

    def begin_run(self, patcher):
        raise RuntimeError("planted")

    def model_loaded(self, *_):
        raise RuntimeError("planted")

    def is_flux(self, patcher):
        raise RuntimeError("planted")

    def free(self, required, device):
        raise RuntimeError("planted")


class HostThatFailsAtTheEnd(Host):
    def end_run(self, run):
        raise RuntimeError("planted")


@pytest.fixture
def comfy():
    """ComfyUI's functions, which count their calls."""
    calls = []

    class Flux:
        def _forward(self, x, timestep, context, y=None, transformer_options={}, **kwargs):  # noqa: B006
            calls.append("_forward")
            return "stock"

    def outer_sample(noise, sigmas):
        calls.append("outer_sample")
        return "sampled"

    def load_diffusion_model(unet_path, model_options={}):  # noqa: B006
        calls.append("load_diffusion_model")
        return "patcher"

    def load_checkpoint_guess_config(ckpt_path, output_model=True, model_options={}):  # noqa: B006
        calls.append("load_checkpoint_guess_config")
        return ("patcher" if output_model else None, "clip", "vae")

    def free_memory(memory_required, device, keep_loaded=[]):  # noqa: B006
        calls.append("free_memory")
        return "freed"

    def partially_load(device_to, extra_memory=0, force_patch_weights=False):
        calls.append(("partially_load", device_to, extra_memory, force_patch_weights))
        return "loaded"

    def load_models_gpu(models, memory_required=0, minimum_memory_required=None):
        calls.append("load_models_gpu")
        return "models loaded"

    return SimpleNamespace(**locals())


def call_all(wrappers, comfy):
    """Call every wrapper as wrapt does; return what ComfyUI's callers get."""
    flux = comfy.Flux()
    arguments = {"timestep": 1, "context": 2}
    load_checkpoint = comfy.load_checkpoint_guess_config
    return [
        wrappers.flux_forward(flux._forward, flux, ("x",), arguments),
        wrappers.outer_sample(comfy.outer_sample, object(), (1, 2), {}),
        wrappers.load_diffusion_model(comfy.load_diffusion_model, None, ("f",), {}),
        wrappers.load_checkpoint(load_checkpoint, None, ("f",), {}),
        wrappers.free_memory(comfy.free_memory, None, (1e30, "gpu"), {}),
        wrappers.partially_load(comfy.partially_load, "patcher", ("gpu", 7), {}),
        wrappers.load_models(comfy.load_models_gpu, None, (["patcher"],), {}),
    ]


STOCK = [
    "stock",
    "sampled",
    "patcher",
    ("patcher", "clip", "vae"),
    "freed",
    "loaded",
    "models loaded",
]
ONCE = [
    "_forward",
    "outer_sample",
    "load_diffusion_model",
    "load_checkpoint_guess_config",
    "free_memory",
    ("partially_load", "gpu", 7, False),
    "load_models_gpu",
]


@pytest.mark.parametrize("host", [Host, FaultyHost, HostThatFailsAtTheEnd])
def test_comfyui_gets_its_own_results_each_computed_once(comfy, host):
    assert call_all(Wrappers(host(), Between()), comfy) == STOCK
    assert comfy.calls == ONCE


def test_an_answer_of_the_workers_takes_the_place_of_the_call(comfy):
    flux = comfy.Flux()
    wrappers = Wrappers(Host(answer="parallel"), Between())
    assert wrappers.flux_forward(flux._forward, flux, (1, 2, 3), {}) == "parallel"
    assert comfy.calls == []


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("X", "T", "C"), {"transformer_options": {"a": 1}, "guidance": 3.5}),
        ((), {"guidance": 3.5, "context": "C", "x": "X", "timestep": "T"}),
        (("X", "T", "C", None, {"a": 1}), {"guidance": 3.5}),
    ],
)
def test_arguments_reach_the_host_by_name_however_they_were_passed(comfy, args, kwargs):
    host, flux = Host(), comfy.Flux()
    Wrappers(host, Between()).flux_forward(flux._forward, flux, args, kwargs)
    ((seen_flux, named),) = host.seen
    assert seen_flux is flux
    assert {name: named[name] for name in ("x", "timestep", "context", "guidance")} == {
        "x": "X",
        "timestep": "T",
        "context": "C",
        "guidance": 3.5,
    }
    assert "kwargs" not in named


def test_the_base_model_is_known_below_its_own_call_only():
    host = Host()
    seen = []

    def apply_model(*_):
        seen.append(host.base_model.get())

    Wrappers(host, Between()).apply_model(apply_model, "base model", (1,), {})
    assert seen == ["base model"]
    assert host.base_model.get() is None


def test_the_base_model_is_forgotten_after_an_exception_too():
    host = Host()

    def apply_model(*_):
        raise KeyError("theirs")

    with pytest.raises(KeyError):
        Wrappers(host, Between()).apply_model(apply_model, "base model", (), {})
    assert host.base_model.get() is None


def test_a_run_ends_also_when_sampling_raises(comfy):
    host = Host()
    error = KeyError("theirs")

    def outer_sample(*_):
        assert host.seen == ["begin"]
        raise error

    with pytest.raises(KeyError) as caught:
        Wrappers(host, Between()).outer_sample(outer_sample, None, (), {})
    assert caught.value is error
    assert host.seen == ["begin", "end of run"]
    assert host.current_run.get() is None


def test_a_models_file_and_options_are_noted(comfy):
    host = Host()
    call_all(Wrappers(host, Between()), comfy)
    assert ("patcher", "load_diffusion_model", "f", {}) in host.seen
    assert ("patcher", "load_checkpoint_guess_config", "f", {}) in host.seen


def test_a_checkpoint_loaded_without_its_model_is_not_noted(comfy):
    host = Host()
    load = comfy.load_checkpoint_guess_config
    loaded = Wrappers(host, Between()).load_checkpoint(load, None, ("f",), {"output_model": False})
    assert loaded == (None, "clip", "vae")
    assert host.seen == []


def test_the_users_interrupt_ends_the_step_and_nothing_is_computed(comfy, interrupt):
    flux = comfy.Flux()
    wrappers = Wrappers(Host(answer=interrupt()), Between())
    with pytest.raises(interrupt):
        wrappers.flux_forward(flux._forward, flux, (1, 2, 3), {})
    assert comfy.calls == []


@pytest.mark.parametrize(
    ("error", "calls"), [(FallBackError("no"), []), (RuntimeError("planted"), ["_forward"])]
)
def test_with_strict_a_step_that_is_not_parallel_is_an_error(comfy, error, calls):
    flux = comfy.Flux()
    wrappers = Wrappers(Host(answer=error, strict=True), Between())
    with pytest.raises(type(error)):
        wrappers.flux_forward(flux._forward, flux, (1, 2, 3), {})
    assert comfy.calls == calls


@pytest.mark.parametrize("strict", [False, True])
def test_a_fault_is_none_of_ours_where_comfyui_cannot_compute_the_step_either(strict, caplog):
    wrappers = Wrappers(Host(answer=RuntimeError("planted"), strict=strict), Between())

    def forward(x):
        raise ValueError("not enough values to unpack")

    with pytest.raises(ValueError, match="not enough values") as caught:
        wrappers.flux_forward(forward, object(), (1,), {})
    assert caught.value.__context__ is None
    assert caplog.records == []


def test_a_model_that_a_worker_has_on_the_same_gpu_gets_next_to_nothing_there(comfy):
    host = Host()
    host.is_held_back = True
    load = comfy.partially_load
    wrappers = Wrappers(host, Between())
    kwargs = {"extra_memory": 10**9, "force_patch_weights": True}
    assert wrappers.partially_load(load, "patcher", ("gpu",), kwargs) == "loaded"
    assert comfy.calls == [("partially_load", "gpu", NEXT_TO_NOTHING, True)]


def test_what_comfyui_wants_free_is_told_to_the_host_afterwards(comfy):
    host = Host()
    Wrappers(host, Between()).free_memory(
        comfy.free_memory, None, (), {"memory_required": 5, "device": "gpu"}
    )
    assert host.seen == [("free", 5, "gpu", False)]
    assert comfy.calls == ["free_memory"]


@pytest.mark.parametrize(("args", "computing"), [((["a"],), 0), ((["a"], 7), 7)])
def test_what_models_compute_with_is_told_to_the_host_before_they_are_loaded(
    comfy, args, computing
):
    host = Host()
    assert (
        Wrappers(host, Between()).load_models(comfy.load_models_gpu, None, args, {})
        == "models loaded"
    )
    assert host.seen == [("loading", computing)]


class Patcher:
    """As ComfyUI's: writes weights, and notes for which hooks."""

    def __init__(self, host):
        self.wrappers = Wrappers(host, Between())
        self.current_hooks = None
        self.written = []

    def patch_hooks(self, hooks):
        self.wrappers.patch_hooks(self._patch_hooks, self, (hooks,), {})

    def _patch_hooks(self, hooks):
        self.written.append(hooks)
        self.current_hooks = hooks


def test_hooks_are_written_only_before_the_hosts_own_forward():
    host = Host(answer="from the workers")
    patcher = Patcher(host)
    for hooks in ("a", "b", "a", "b"):
        patcher.patch_hooks(hooks)
        assert patcher.current_hooks == hooks
        assert patcher.wrappers.flux_forward(lambda x: x, object(), (1,), {}) == "from the workers"
    assert patcher.written == []
    host.answer = None
    assert patcher.wrappers.flux_forward(lambda x: list(patcher.written), object(), (1,), {}) == [
        "b"
    ]
    assert patcher.wrappers.flux_forward(lambda x: list(patcher.written), object(), (1,), {}) == [
        "b"
    ]


def test_hooks_that_are_taken_off_or_applied_are_not_made_up_for():
    host = Host()
    patcher = Patcher(host)
    patcher.patch_hooks("a")
    patcher.patch_hooks(None)
    host.hooks.make_up()
    assert patcher.written == [None]
    patcher.patch_hooks("a")
    host.leaves_out = False
    patcher.patch_hooks("b")
    host.hooks.make_up()
    assert patcher.written == [None, "b"]


def test_a_failed_attempt_and_hooks_that_cannot_be_written_are_no_image():
    host = Host(answer=ValueError("ours"))
    patcher = Patcher(host)
    host.refuse = lambda refusal: None
    patcher.patch_hooks("a")
    assert patcher.wrappers.flux_forward(lambda x: list(patcher.written), object(), (1,), {}) == [
        "a"
    ]

    class Broken(Patcher):
        def _patch_hooks(self, hooks):
            raise MemoryError("no room for the weights")

    host.answer = None
    broken = Broken(host)
    broken.patch_hooks("a")
    with pytest.raises(MemoryError):
        broken.wrappers.flux_forward(lambda x: x, object(), (1,), {})


def test_each_prompt_says_why_its_steps_are_not_parallel(caplog):
    def prompt():
        for _tile in range(3):
            warn_once("the reason of two models, one after the other")

    host = Host()
    host.books = SimpleNamespace(begin_prompt=lambda: None, end_prompt=lambda: None)
    for _model in range(2):
        Wrappers(host, Between()).execute_prompt(prompt, None, (), {})
    assert len(caplog.records) == 2

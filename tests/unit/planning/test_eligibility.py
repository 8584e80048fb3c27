"""Every reason for which a call stays in ComfyUI's own process."""

from __future__ import annotations

import types
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.planning.bypass import BypassCode
from comfy_xdit_patch.planning.eligibility import (
    CARRIED_ARGUMENTS,
    Pristine,
    blocking,
    check_arguments,
    check_forward,
    check_grad,
    check_patcher,
)


class Module:
    """As much of ``torch.nn.Module`` as is looked at."""

    def __init__(self):
        self._forward_hooks = {}
        self._forward_pre_hooks = {}


class World:
    """ComfyUI's three FLUX modules and one model, all of plain classes."""

    def __init__(self):
        class DoubleStreamBlock(Module):
            def forward(self):
                pass

        class SingleStreamBlock(Module):
            def forward(self):
                pass

        class Flux(Module):
            def forward_orig(self):
                pass

            def process_img(self):
                pass

            def named_modules(self):
                yield "", self
                for index, block in enumerate(self.double_blocks):
                    yield f"double_blocks.{index}", block
                for index, block in enumerate(self.single_blocks):
                    yield f"single_blocks.{index}", block

        self.model = types.ModuleType("comfy.ldm.flux.model")
        self.model.Flux, self.model.timestep_embedding = Flux, lambda: None
        self.layers = types.ModuleType("comfy.ldm.flux.layers")
        self.layers.DoubleStreamBlock = DoubleStreamBlock
        self.layers.SingleStreamBlock = SingleStreamBlock
        self.layers.attention = lambda: None
        self.math = types.ModuleType("comfy.ldm.flux.math")
        self.math.optimized_attention = lambda: None
        self.math.apply_rope = lambda: None
        self.flux = Flux()
        self.flux.double_blocks = [DoubleStreamBlock() for _ in range(2)]
        self.flux.single_blocks = [SingleStreamBlock() for _ in range(2)]
        self.pristine = Pristine({m.__name__: m for m in (self.model, self.layers, self.math)})


def another(*_):
    pass


@pytest.fixture
def world():
    return World()


def test_comfyuis_own_code_is_not_refused(world):
    assert world.pristine.check_step(world.flux) == []
    assert world.pristine.check_modules(world.flux) == []


def change_class(world):
    world.flux.__class__ = type("MyFlux", (type(world.flux),), {})


def replace_forward_orig(world):
    world.model.Flux.forward_orig = another


def remove_forward_orig(world):
    del world.model.Flux.forward_orig


def replace_block_forward(world):
    world.layers.SingleStreamBlock.forward = another


def replace_attention(world):
    world.math.optimized_attention = another


def replace_embedding(world):
    world.model.timestep_embedding = another


def replace_on_instance(world):
    world.flux.process_img = another


def replace_block(world):
    world.flux.single_blocks[1] = type("CachedBlock", (Module,), {})()


def subclass_block(world):
    block = world.flux.double_blocks[0]
    block.__class__ = type("TimedBlock", (type(block),), {})


@pytest.mark.parametrize(
    ("change", "reason", "is_around_blocks"),
    [
        (change_class, "the diffusion model's class was changed to MyFlux", False),
        (replace_forward_orig, f"{__name__}.Flux.forward_orig was replaced by tests", True),
        (
            remove_forward_orig,
            f"{__name__}.Flux.forward_orig was replaced by another extension",
            True,
        ),
        (
            replace_block_forward,
            f"{__name__}.SingleStreamBlock.forward was replaced by tests",
            False,
        ),
        (
            replace_attention,
            "comfy.ldm.flux.math.optimized_attention was replaced by tests",
            False,
        ),
        (
            replace_embedding,
            "comfy.ldm.flux.model.timestep_embedding was replaced by tests",
            False,
        ),
        (replace_on_instance, "a node replaced process_img of this model", True),
        (replace_block, "a node replaced a block of this model by CachedBlock", False),
        (subclass_block, "a node replaced a block of this model by TimedBlock", False),
    ],
)
def test_changed_code_is_seen(world, change, reason, is_around_blocks):
    """What lies around the blocks leaves them to the workers; the rest lasts for the run."""
    change(world)
    found = world.pristine.check_step(world.flux)
    assert found == [Refusal(reason, Scope.RUN, is_around_blocks=is_around_blocks)]
    assert blocking(found) == (None if is_around_blocks else found[0])


def test_an_object_patch_that_was_taken_back_is_no_change(world):
    """ComfyUI puts the bound original back as an attribute of the instance."""
    world.flux.forward_orig = world.flux.forward_orig
    assert "forward_orig" in vars(world.flux)
    assert world.pristine.check_step(world.flux) == []


def test_what_another_extension_does_above_our_wrapper_is_no_obstacle(world):
    world.model.Flux.forward = another
    world.model.Flux._forward = another
    assert world.pristine.check_step(world.flux) == []


def set_forward_of_block(flux):
    flux.single_blocks[1].forward = another


def hook_block(flux):
    flux.double_blocks[0]._forward_hooks[1] = another


def pre_hook_model(flux):
    flux._forward_pre_hooks[1] = another


@pytest.mark.parametrize(
    ("change", "reason", "is_around_blocks"),
    [
        (set_forward_of_block, "a node replaced the forward of single_blocks.N", False),
        (hook_block, "a forward hook is set on double_blocks.N", True),
        (pre_hook_model, "a forward hook is set on the model", True),
    ],
)
def test_what_hangs_on_single_modules_is_refused_under_one_name_for_all_blocks(
    world, change, reason, is_around_blocks
):
    change(world.flux)
    found = world.pristine.check_modules(world.flux)
    assert found == [Refusal(reason, is_around_blocks=is_around_blocks)]


def test_a_forward_that_was_put_back_is_no_change(world):
    block = world.flux.double_blocks[0]
    block.forward = block.forward
    assert world.pristine.check_modules(world.flux) == []


def test_a_compiled_block_stands_in_for_its_own(world):
    compiled = Module()
    compiled.forward, compiled._orig_mod = another, world.flux.double_blocks[0]
    world.flux.double_blocks[0] = compiled
    assert world.pristine.check_step(world.flux) == []
    assert world.pristine.check_modules(world.flux) == []


def test_a_call_that_never_came_to_us_has_a_reason(world):
    assert check_forward(world.flux) == []
    world.flux.forward = another
    assert check_forward(world.flux) == [
        Refusal("a node put a forward of its own on the whole model", Scope.STEP)
    ]


BYPASS = BypassCode({})


def hooks(*types):
    return SimpleNamespace(
        hooks=[SimpleNamespace(hook_type=SimpleNamespace(value=t)) for t in types]
    )


def patcher(**changes):
    return SimpleNamespace(patches={}, object_patches={}, **changes)


@pytest.mark.parametrize(
    "plain",
    [
        patcher(),
        patcher(weight_wrapper_patches={}, is_injected=False, hook_patches={}, current_hooks=None),
        patcher(hook_patches={"h": {}}, current_hooks=hooks("weight", "transformer_options")),
    ],
)
def test_a_patcher_that_changed_nothing_is_not_refused(plain):
    assert check_patcher(SimpleNamespace(current_patcher=plain), BYPASS) == []


def test_object_patches_outside_of_the_diffusion_model_are_not_refused():
    current = patcher()
    current.object_patches = {"model_sampling": object(), "latent_format": object()}
    assert check_patcher(SimpleNamespace(current_patcher=current), BYPASS) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_wrapper_patches": {"w": [another]}}, "the model has weight wrappers"),
        (
            {"is_injected": True, "injections": {"x": [SimpleNamespace(inject=another)]}},
            "a node injected code into the model's modules",
        ),
        (
            {"current_hooks": hooks("weight", "add_injections")},
            "a hook of type add_injections is set on the model",
        ),
        (
            {"object_patches": {"diffusion_model.double_blocks.7.img_mlp": 1}},
            "a node patched diffusion_model.double_blocks.N.img_mlp of the model",
        ),
    ],
)
def test_a_patcher_that_changes_the_model_is_refused(changes, reason):
    current = SimpleNamespace(**{"patches": {}, "object_patches": {}, **changes})
    assert check_patcher(SimpleNamespace(current_patcher=current), BYPASS) == [Refusal(reason)]


def test_a_model_without_a_patcher_is_refused():
    found = check_patcher(SimpleNamespace(current_patcher=None), BYPASS)
    assert found == [Refusal("the model has no current ModelPatcher")]


def test_what_a_node_changed_around_the_blocks_leaves_them_to_the_workers():
    current = patcher()
    current.object_patches = {"diffusion_model.forward_orig": another}
    found = check_patcher(SimpleNamespace(current_patcher=current), BYPASS)
    reason = "a node patched diffusion_model.forward_orig of the model"
    assert found == [Refusal(reason, is_around_blocks=True)]


def test_the_default_of_an_argument_and_a_compiled_model_are_no_change():
    current = patcher()
    current.object_patches = {
        "diffusion_model.params.default_ref_method": "index_timestep_zero",
        "diffusion_model": SimpleNamespace(_orig_mod=object()),
    }
    assert check_patcher(SimpleNamespace(current_patcher=current), BYPASS) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict.fromkeys(CARRIED_ARGUMENTS),
        {"transformer_options": None},
        {"control": None, "attention_mask": None},
        {"transformer_options": {"patches": {"double_block": []}, "patches_replace": {"dit": {}}}},
        {"transformer_options": {"rope_options": {"scale_x": 2.0}, "cond_or_uncond": [0]}},
        {"ref_latents": [1], "ref_latents_method": "offset"},
        {"ref_latents": [1], "ref_latents_method": "uxo"},
        {"ref_latents": [1], "ref_latents_method": "index_timestep_zero"},
        {"control": {"input": [None], "middle": [], "output": []}},
        {"attention_mask": 1},
    ],
)
def test_these_arguments_are_not_refused(arguments):
    assert check_arguments(arguments) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {"transformer_options": {"multigpu_thread_device": "cuda:1"}},
            "ComfyUI's own MultiGPU split is active",
        ),
        ({"control": {"input": [], "extra": []}}, "a ControlNet has extra residuals"),
    ],
)
def test_these_arguments_are_refused_for_this_step(arguments, reason):
    assert check_arguments(arguments) == [Refusal(reason, Scope.STEP)]


def test_training_is_refused_and_sampling_is_not():
    x = torch.zeros(1, requires_grad=True)
    assert check_grad(x) == [Refusal("gradients are wanted", Scope.STEP)]
    assert check_grad(x.detach()) == []
    with torch.no_grad():
        assert check_grad(x) == []

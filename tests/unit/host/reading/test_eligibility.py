"""Every reason for which a call stays in ComfyUI's own process."""

from __future__ import annotations

import types
from types import SimpleNamespace

import pytest

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.reading.eligibility import BypassCode, Pristine, blocking, check_patcher

HERE = __name__


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
                for name, module in vars(self).items():
                    if isinstance(module, Module):
                        yield name, module

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
        (change_class, f"the diffusion model's class was changed to {HERE}.MyFlux", True),
        (replace_on_instance, f"a node replaced process_img of this model by {HERE}.another", True),
        (replace_block, f"a node replaced a block of this model by {HERE}.CachedBlock", False),
        (subclass_block, f"a node replaced a block of this model by {HERE}.TimedBlock", False),
    ],
)
def test_changed_code_is_seen(world, change, reason, is_around_blocks):
    """What lies around the blocks leaves them to the workers; the rest lasts for the run."""
    change(world)
    found = world.pristine.check_step(world.flux)
    assert found == [Refusal(reason, Scope.RUN, is_around_blocks=is_around_blocks)]
    assert blocking(found) == (None if is_around_blocks else found[0])


def test_a_module_of_a_packs_own_around_the_blocks_is_seen(world):
    """Not what ComfyUI, torch or the operations of the blocks bring."""
    world.flux.pe_embedder = type("Positions", (Module,), {"__module__": "some.pack"})()
    world.flux.img_in = type("Linear", (Module,), {"__module__": "comfy.ops"})()
    world.flux.txt_in = type("Quantised", (Module,), {})()
    found = world.pristine.check_modules(world.flux)
    reason = "a node put some.pack.Positions in the place of pe_embedder"
    assert found == [Refusal(reason, is_around_blocks=True)]


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


def replace_method_of_norm(flux):
    flux.single_blocks[0].norm = flux.single_blocks[0].forward
    type(flux.single_blocks[0]).norm = lambda self: None


def hook_block(flux):
    flux.double_blocks[0]._forward_hooks[1] = another


def pre_hook_model(flux):
    flux._forward_pre_hooks[1] = another


@pytest.mark.parametrize(
    ("change", "reason", "is_around_blocks"),
    [
        (
            set_forward_of_block,
            f"a node replaced the forward of single_blocks.N by {HERE}.another",
            False,
        ),
        (
            replace_method_of_norm,
            f"a node replaced norm of single_blocks.N by {HERE}.World.__init__.SingleStreamBlock."
            "forward",
            False,
        ),
        (hook_block, f"a forward hook is set on double_blocks.N: {HERE}.another", True),
        (pre_hook_model, f"a forward hook is set on the model: {HERE}.another", True),
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
    compiled.forward, compiled._modules = another, {"_orig_mod": world.flux.double_blocks[0]}
    world.flux.double_blocks[0] = compiled
    assert world.pristine.check_step(world.flux) == []
    assert world.pristine.check_modules(world.flux) == []


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
            f"a node injected code into the model's modules: {HERE}.another",
        ),
        (
            {"current_hooks": hooks("weight", "add_injections")},
            "a hook of type add_injections is set on the model",
        ),
        (
            {"object_patches": {"diffusion_model.double_blocks.7.img_mlp": 1}},
            "a node patched diffusion_model.double_blocks.N.img_mlp of the model by another int",
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
    reason = f"a node patched diffusion_model.forward_orig of the model by {HERE}.another"
    assert found == [Refusal(reason, is_around_blocks=True)]


def test_the_default_of_an_argument_and_a_compiled_model_are_no_change():
    current = patcher()
    current.object_patches = {
        "diffusion_model.params.default_ref_method": "index_timestep_zero",
        "diffusion_model": SimpleNamespace(_orig_mod=object()),
    }
    assert check_patcher(SimpleNamespace(current_patcher=current), BYPASS) == []

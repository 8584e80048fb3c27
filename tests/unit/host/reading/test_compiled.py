"""What stands in for a model and its blocks is read from torch's own objects; nothing is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.reading.compiled import compiled_blocks, is_compiled


class Flux(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
        self.single_blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])


def whole(**how: Any) -> SimpleNamespace:
    return SimpleNamespace(diffusion_model=torch.compile(Flux(), **how))


def blocks(*names: str, **how: Any) -> SimpleNamespace:
    flux = Flux()
    for name in names:
        owner, number = name.split(".")
        block_list = getattr(flux, owner)
        block_list[int(number)] = torch.compile(block_list[int(number)], **how)
    return SimpleNamespace(diffusion_model=flux)


def own_backend(graph: Any, inputs: Any) -> Any:
    return graph.forward


def test_a_model_as_it_is_asks_for_nothing():
    assert compiled_blocks(SimpleNamespace(diffusion_model=Flux())) is None
    assert compiled_blocks(SimpleNamespace()) is None  # a ControlNet's


@pytest.mark.parametrize("backend", ["inductor", "eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_a_whole_model_is_all_of_its_blocks(backend, dynamic):
    found = compiled_blocks(whole(backend=backend, dynamic=dynamic))
    assert found == {"backend": backend, "options": {}, "dynamic": dynamic, "blocks": None}


def test_single_blocks_are_named():
    found = compiled_blocks(blocks("double_blocks.1", "single_blocks.2", backend="eager"))
    assert found["blocks"] == ["double_blocks.1", "single_blocks.2"]


def test_a_mode_is_options_and_cuda_graphs_are_left_out():
    found = compiled_blocks(whole(mode="max-autotune"))
    assert found["options"] == {"max_autotune": True, "coordinate_descent_tuning": True}
    assert compiled_blocks(whole(mode="reduce-overhead"))["options"] == {}


def test_guards_are_the_ranks_own():
    """As ComfyUI's node from 0.33 on: it has guards on options of the call left out."""
    found = compiled_blocks(
        whole(options={"guard_filter_fn": lambda guards: guards, "cpp.simdlen": 8})
    )
    assert found["options"] == {"cpp.simdlen": 8}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: whole(backend="cudagraphs"), "ranks do not compile by the backend cudagraphs"),
        (lambda: whole(backend=own_backend), "ranks do not compile by the backend own_backend"),
        (
            lambda: whole(options={"post_grad_custom_post_pass": torch.nn.ReLU()}),
            "the compiler's option post_grad_custom_post_pass cannot be carried",
        ),
    ],
)
def test_what_ranks_cannot_be_given_is_a_refusal(model, reason):
    assert compiled_blocks(model()) == Refusal(reason)


def test_blocks_that_are_compiled_in_different_ways_are_a_refusal():
    model = blocks("double_blocks.0", backend="eager")
    list_of_blocks = model.diffusion_model.single_blocks
    list_of_blocks[0] = torch.compile(list_of_blocks[0], backend="eager", dynamic=True)
    assert compiled_blocks(model) == Refusal("they are compiled in different ways")


def test_a_patcher_tells_whether_its_model_will_be_compiled():
    compiled = torch.compile(Flux(), backend="eager")
    for options, patches, expected in (
        ({}, {}, False),
        ({}, {"manual_cast_dtype": torch.float16}, False),
        ({"torch_compile_kwargs": {"backend": "eager"}}, {}, True),
        ({}, {"diffusion_model": compiled}, True),
    ):
        patcher = SimpleNamespace(model_options=options, object_patches=patches)
        assert is_compiled(patcher) == expected
    assert not is_compiled(None)

"""Which arguments of a call the workers can be given, and which are not what their name says."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.reading.arguments import check_arguments, check_grad, misplaced
from comfy_xdit_patch.planning.workload import CARRIED_ARGUMENTS

x = torch.zeros(1, 4, 2, 2)
PLAIN = {"x": x, "timestep": x, "context": x}


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


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"y": x, "guidance": None, "attention_mask": x, "transformer_options": {}},
        {"control": {"input": [x, None], "output": []}, "ref_latents": [x]},
        {"control": {"extra": [x]}, "anything": object()},
    ],
)
def test_arguments_in_their_places(more):
    assert misplaced({**PLAIN, **more}) is None


@pytest.mark.parametrize(
    ("more", "what", "name"),
    [
        # ``ref_latents`` came between ``guidance`` and ``control``: a pack that passes seven
        # arguments by position shifts all that follow.
        ({"control": {"wrappers": {}, "patches": {}}}, "dict of wrappers, patches", "control"),
        ({"ref_latents": {"input": [x]}}, "dict of input", "ref_latents"),
        ({"transformer_options": x}, "Tensor", "transformer_options"),
        ({"guidance": {}}, "dict of ", "guidance"),
        ({"context": None}, "NoneType", "context"),
    ],
)
def test_an_argument_in_the_place_of_another_is_named_as_that(more, what, name):
    refusal = misplaced({**PLAIN, **more})
    assert refusal == Refusal(f"a node called the model with a {what} as its {name}", Scope.STEP)

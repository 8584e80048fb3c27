"""Blocks of other stages are out of the model, and come back as they were."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.worker.weights.stage_blocks import StagedBlocks


class Flux(torch.nn.Module):
    """Three double and eleven single blocks of one layer."""

    def __init__(self):
        super().__init__()
        self.img_in = torch.nn.Linear(1, 1)
        self.double_blocks = torch.nn.ModuleList(block() for _ in range(3))
        self.single_blocks = torch.nn.ModuleList(block() for _ in range(11))


def block():
    return torch.nn.ModuleDict({"linear": torch.nn.Linear(1, 1)})


def names(flux):
    return {name.rpartition(".linear")[0] for name, _ in flux.named_parameters()} - {""}


@pytest.fixture
def flux():
    return Flux()


@pytest.mark.parametrize(
    ("stage", "kept"),
    [
        (range(0, 2), {"double_blocks.0", "double_blocks.1"}),
        (range(2, 5), {"double_blocks.2", "single_blocks.0", "single_blocks.1"}),
        (range(4, 5), {"single_blocks.1"}),  # and not single_blocks.10
        (range(13, 14), {"single_blocks.10"}),
    ],
)
def test_a_stage_has_its_own_blocks_and_what_is_in_no_block(flux, stage, kept):
    keys = [f"diffusion_model.{name}" for name, _ in flux.named_parameters()]
    staged = StagedBlocks(flux)
    staged.keep(stage)
    assert names(flux) == kept
    present = {f"diffusion_model.{name}" for name, _ in flux.named_parameters()}
    assert staged.in_place(keys) == present
    assert "diffusion_model.img_in.weight" in present
    assert staged.cut(dict.fromkeys(keys, 1)) == dict.fromkeys(present, 1)


def test_another_stage_and_the_whole_find_the_very_same_blocks(flux):
    before = dict(flux.named_modules())
    staged = StagedBlocks(flux)
    for stage in (range(0, 2), range(6, 9), None):
        staged.keep(stage)
        assert staged.stage == stage
    assert dict(flux.named_modules()) == before
    assert staged.in_place(["diffusion_model.single_blocks.10.linear.weight"])


def test_every_block_is_on_one_stage(flux):
    staged, found = StagedBlocks(flux), []
    for stage in (range(0, 5), range(5, 10), range(10, 14)):
        staged.keep(stage)
        found += names(flux)
    assert len(found) == len(set(found)) == 14

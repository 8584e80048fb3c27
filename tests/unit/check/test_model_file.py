"""The model file is one of FLUX.1, of the stated size, with values as wanted."""

from __future__ import annotations

import pytest
import torch
from rig import weights
from safetensors.torch import load_file

from comfy_xdit_patch.check.model_file import Sizes, file_bytes, weights_of, write_model

SMALL = Sizes(width=128, num_double=1, num_single=2)


def test_keys_and_shapes_are_those_of_flux(tmp_path):
    write_model(tmp_path / "model.safetensors", SMALL)
    state = load_file(tmp_path / "model.safetensors")
    rig = weights.flux(hidden=128, double=1, single=2, guidance=True, seed=1)
    assert set(state) == set(rig)
    differing = {name for name, tensor in state.items() if tensor.shape != rig[name].shape}
    assert differing == {"txt_in.weight", "vector_in.in_layer.weight"}  # the rig's are narrow
    assert sum(tensor.nbytes for tensor in state.values()) == file_bytes(SMALL)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_values_are_random_with_the_wanted_spread(tmp_path):
    write_model(tmp_path / "model.safetensors", SMALL)
    state = load_file(tmp_path / "model.safetensors")
    wanted = {weight.name: weight for weight in weights_of(SMALL)}
    name = "single_blocks.1.linear2.weight"
    assert state[name].float().std().item() == pytest.approx(wanted[name].std, rel=0.02)
    assert state["single_blocks.0.norm.key_norm.scale"].float().mean().item() == pytest.approx(
        1.5, abs=0.05
    )
    assert not torch.equal(state[name], state["single_blocks.0.linear2.weight"])
    rows = state["double_blocks.0.img_mlp.0.weight"].float()
    assert rows.unique(dim=0).shape[0] == len(rows)


def test_the_whole_model_is_as_large_as_flux():
    assert file_bytes(Sizes(3072, 19, 38)) / 2 == pytest.approx(11.9e9, rel=0.01)

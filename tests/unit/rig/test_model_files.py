"""The files that the rig writes mean what they should, and always the same."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from rig import gguf_files, loras, quantised, weights

HIDDEN = 256


@pytest.fixture(scope="module")
def flux() -> weights.State:
    return weights.flux(hidden=HIDDEN, double=1, single=1, guidance=True, seed=1)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        # Half a step of a block's 255 or 15 steps, which span about 5 standard deviations.
        (gguf.GGMLQuantizationType.Q8_0, 0.01),
        (gguf.GGMLQuantizationType.Q4_K, 0.1),
    ],
)
def test_a_gguf_matrix_is_read_back(kind: gguf.GGMLQuantizationType, bound: float) -> None:
    values = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    blocks = gguf_files.quantise(values, kind)
    error = gguf.quants.dequantize(blocks, kind) - values
    assert 0 < error.std() < bound


def test_q4_k_keeps_rows_without_spread() -> None:
    values = np.repeat(np.float32([[0.0], [0.5], [-0.5]]), 256, axis=1)
    kind = gguf.GGMLQuantizationType.Q4_K
    read = gguf.quants.dequantize(gguf_files.quantise_q4_k(values), kind)
    np.testing.assert_allclose(read, values, atol=0.01)


def test_a_kohya_lora_is_a_third_of_each_matrix(flux: weights.State) -> None:
    state = loras.kohya(loras.block_shapes(flux), seed=2)
    for name in loras.block_shapes(flux):
        key = "lora_unet_" + name.replace(".", "_")
        down = state[f"{key}.lora_down.weight"]
        change = state[f"{key}.lora_up.weight"] @ down * state[f"{key}.alpha"] / down.shape[0]
        expected = loras.STRENGTH * change.shape[1] ** -0.5
        assert 0.5 < float(change.std()) / expected < 2, name


def test_a_diffusers_lora_cuts_fused_matrices(flux: weights.State) -> None:
    state = loras.diffusers(loras.block_shapes(flux), seed=2)
    rows = {
        "transformer_blocks.0.attn.to_q": HIDDEN,
        "single_transformer_blocks.0.proj_mlp": 4 * HIDDEN,
        "single_transformer_blocks.0.proj_out": HIDDEN,
        "norm_out.linear": 2 * HIDDEN,
    }
    for name, expected in rows.items():
        assert state[f"transformer.{name}.lora_B.weight"].shape[0] == expected, name


def test_the_control_lora_widens_the_input(flux: weights.State) -> None:
    state = loras.bfl_control(flux, seed=2)
    assert state["img_in.lora_A.weight"].shape[1] == 2 * flux["img_in.weight"].shape[1]
    assert "single_blocks.0.norm.key_norm.scale" in state  # by which ComfyUI knows the format


def test_scaled_fp8_is_read_back(flux: weights.State) -> None:
    state = quantised.scaled_fp8(flux, with_inputs=False)
    for name, tensor in flux.items():
        if tensor.ndim == 2:
            scale = state[name.removesuffix("weight") + "scale_weight"]
            torch.testing.assert_close(state[name].float() * scale, tensor, rtol=0.07, atol=1e-3)


def test_the_same_seed_gives_the_same_files(flux: weights.State) -> None:
    first, second = (loras.files(flux, seed=3) for _ in range(2))
    assert first.keys() == second.keys()
    for name, state in first.items():
        assert all(torch.equal(tensor, second[name][key]) for key, tensor in state.items()), name

"""Which tokens a layer of FLUX reads, and where its scale goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.worker.shard.quantised import scales_on_weights, stream_of
from comfy_xdit_patch.worker.shard.sequence import stream_counts

STREAMS = {
    "img_in": "image",
    "txt_in": "text",
    "time_in.in_layer": None,
    "vector_in.out_layer": None,
    "guidance_in.in_layer": None,
    "double_blocks.7.img_mod.lin": None,
    "double_blocks.7.txt_mod.lin": None,
    "double_blocks.7.img_attn.qkv": "image",
    "double_blocks.7.img_attn.proj": "image",
    "double_blocks.7.img_mlp.0": "image",
    "double_blocks.7.txt_attn.qkv": "text",
    "double_blocks.7.txt_mlp.2": "text",
    "single_blocks.11.linear1": "joint",
    "single_blocks.11.linear2": "joint",
    "single_blocks.11.modulation.lin": None,
    "final_layer.linear": "image",
    "final_layer.adaLN_modulation.1": None,
    "double_stream_modulation_img.lin": None,
}


@pytest.mark.parametrize("layer", STREAMS)
def test_every_layer_of_flux_reads_these_tokens(layer):
    assert stream_of(layer) == STREAMS[layer]


def layer_of(rows, columns, scale=2.0):
    """Stand for a Linear of old scaled fp8."""
    return SimpleNamespace(
        weight=torch.ones(rows, columns),
        scale_weight=torch.nn.Parameter(torch.tensor(scale), requires_grad=False),
        weight_function=[],
    )


@pytest.mark.parametrize(
    ("whole", "local", "is_moved"),
    [(100, 30, True), (100, 60, False), (40, 20, False), (51, 50, True), (50, 50, False)],
)
def test_the_scale_moves_only_where_the_whole_falls_on_the_other_side(whole, local, is_moved):
    layer = layer_of(50, 8)  # 50 tokens of 8 columns have as many elements as the weight
    before = layer.scale_weight
    with scales_on_weights({"img_in": layer}, whole={"image": whole}, local={"image": local}):
        assert (layer.scale_weight is not before) == is_moved
        assert len(layer.weight_function) == is_moved
        if is_moved:
            assert layer.scale_weight == 1
            assert torch.equal(layer.weight_function[0](layer.weight), layer.weight * 2)
    assert layer.scale_weight is before
    assert layer.weight_function == []


def test_scales_are_back_after_an_exception():
    layer = layer_of(50, 8)
    before = layer.scale_weight
    with (
        pytest.raises(KeyError),
        scales_on_weights({"img_in": layer}, whole={"image": 100}, local={"image": 30}),
    ):
        raise KeyError
    assert layer.scale_weight is before
    assert layer.weight_function == []


def test_the_whole_has_all_rows_however_they_are_dealt():
    shares = ParallelPlan(batch=2, ulysses=2, weights=(3, 1, 1, 1)).sequence_shares(
        0, num_text_tokens=8, num_image_tokens=24, num_reference_tokens=8, num_heads=4
    )
    counts = stream_counts(shares, 1, rows=2, num_rows=3)
    assert counts["whole"] == {"text": 24, "image": 96, "joint": 120, None: 3}
    assert counts["local"] == {"text": 4, "image": 16, "joint": 20, None: 2}

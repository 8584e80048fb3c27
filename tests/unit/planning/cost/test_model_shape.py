"""Models as numbers: weights, FLOPs and tokens against published figures."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.planning.cost.known_models import FLUX1_DEV, FLUX2_DEV, KLEIN_9B, MODELS
from comfy_xdit_patch.planning.cost.model_shape import PRECISIONS, workload_for


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("flux1-dev", 11.901),
        ("flux1-schnell", 11.891),
        ("flux1-kontext", 11.901),
        ("flux1-fill", 11.902),
        ("flux2-dev", 32.223),
        ("flux2-klein-9b", 9.079),
        ("flux2-klein-4b", 3.876),
        ("chroma", 8.900),
    ],
)
def test_every_model_has_its_published_number_of_weights(name, billions):
    assert MODELS[name].num_weights / 1e9 == pytest.approx(billions, abs=6e-4)


def test_every_model_of_the_table_is_counted_here():
    assert len(MODELS) == 8
    assert all(shape.name == name for name, shape in MODELS.items())


@pytest.mark.parametrize(
    ("shape", "part"), [(FLUX1_DEV, 0.271), (FLUX2_DEV, 0.018), (KLEIN_9B, 0.028)]
)
def test_modulation_is_more_than_a_quarter_of_flux1_and_little_of_flux2(shape, part):
    assert shape.num_modulation_weights / shape.num_weights == pytest.approx(part, abs=5e-4)


# TFLOP of linears and attention for 512 text tokens; Kontext has a reference of the same size.
@pytest.mark.parametrize(
    ("name", "px", "tokens", "linear", "attention"),
    [
        ("flux1-dev", 512, 1536, 19.8, 1.7),
        ("flux1-dev", 1024, 4608, 59.5, 14.9),
        ("flux1-dev", 4096, 66048, 852.7, 3055.5),
        ("flux1-kontext", 1024, 8704, 112.4, 53.1),
        ("flux2-dev", 1024, 4608, 253.4, 29.2),
        ("flux2-dev", 2048, 16896, 928.8, 392.9),
        ("flux2-klein-9b", 1024, 4608, 64.4, 11.1),
    ],
)
def test_flops_are_those_of_the_published_architecture(name, px, tokens, linear, attention):
    shape = MODELS[name]
    workload = workload_for(shape, width_px=px, height_px=px, num_text_tokens=512)
    assert workload.num_tokens == tokens
    assert shape.linear_flops(tokens) / 1e12 == pytest.approx(linear, rel=3e-3)
    assert shape.attention_flops(tokens) / 1e12 == pytest.approx(attention, abs=0.06)


@pytest.mark.parametrize(
    ("name", "heads", "gathers"),
    [("flux1-dev", 24, 76), ("flux2-dev", 48, 64), ("flux2-klein-9b", 32, 40)],
)
def test_heads_and_all_reduces_follow_from_width_and_blocks(name, heads, gathers):
    assert MODELS[name].num_heads == heads
    assert MODELS[name].num_gathers == gathers


def test_a_size_that_16_does_not_divide_is_rounded_up():
    workload = workload_for(FLUX1_DEV, width_px=1000, height_px=17)
    assert workload.num_image_tokens == 63 * 2
    assert workload.num_text_tokens == 256
    assert workload.num_reference_tokens == 0


def test_references_and_rows_are_counted():
    shape = MODELS["flux1-kontext"]
    workload = workload_for(shape, width_px=512, height_px=512, num_rows=2)
    assert (workload.batch_size, workload.num_reference_tokens) == (2, 1024)
    plain = workload_for(shape, width_px=512, height_px=512, num_references=0)
    assert plain.num_reference_tokens == 0


def test_precision_scales_the_bytes_and_only_narrow_weights_are_cast():
    sizes = {name: FLUX1_DEV.sizes(precision) for name, precision in PRECISIONS.items()}
    assert sizes["bf16"].total_bytes == 2 * 11_901_408_320
    assert sizes["fp8"].total_bytes == 11_901_408_320
    assert sizes["4bit"].total_bytes / 1e9 == pytest.approx(6.69, abs=0.01)
    assert sizes["bf16"].largest_block_bytes == 2 * 339_831_296
    assert sizes["bf16"].outside_blocks_bytes == 2 * 64_124_992
    assert sizes["bf16"].cast_bytes == 0
    assert sizes["fp8"].cast_bytes == 2 * (3072 * 7 * 3072 + 7 * 3072)
    assert sizes["fp8"].as_cast == sizes["bf16"]
    assert {name for name, size in sizes.items() if size.as_cast} == {"fp8"}
    assert FLUX2_DEV.sizes(PRECISIONS["fp8"]).as_cast is None, "it has no modulation to share"

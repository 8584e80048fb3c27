"""The FLUX family on ranks equals stock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from exactness import BOUND, STRICT, compare
from inside.client import Inside
from rig.breadth import is_whole
from rig.trees import Tree

SMALL = {"height": 10, "width": 13, "batch": 1, "text_tokens": 77}
# Every larger block is mapped by itself and given back at once, in stock and ranks alike, so that
# the peak of resident memory is the peak of live tensors.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


@pytest.mark.group("3")
@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("schnell", SMALL),
        ("fill", SMALL),
        ("flux2", SMALL),
        ("flux2", SMALL | {"batch": 2, "refs": [[7, 9]], "ref_method": "index"}),
        ("chroma", SMALL),
        ("chroma", SMALL | {"batch": 2, "control": 35, "mask": True}),
        ("chroma_radiance_linear", {**SMALL, "height": 70, "width": 99}),
        ("chroma_radiance_conv", {**SMALL, "height": 96, "width": 80, "batch": 3}),
        # A time step of their own, 0, for the references; before 0.33 ComfyUI does not know it.
        ("flux2", SMALL | {"refs": [[7, 9], [4, 4]], "ref_method": "index_timestep_zero"}),
    ],
)
def test_each_family_equals_stock(
    tree: Tree,
    inside: Callable[..., Inside],
    tmp_path: Path,
    family: str,
    case: dict[str, object],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    path = str(tmp_path / f"{family}.safetensors")
    stock.call(
        "families:write_model", path=path, family=family, hidden=512, double=2, single=2, context=64
    )
    error, before, after = compare(stock, ranks, path, tmp_path, **case)
    assert error <= BOUND
    assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1


@pytest.mark.group("3")
# Fp8 and heads that do not divide by the ranks: every run has them in smaller models, below.
@pytest.mark.thorough
@pytest.mark.newest_only
@pytest.mark.group("native")
@pytest.mark.slow  # a model of FLUX.1's own width, and up to 7 processes that hold it
def test_24_heads_on_7_ranks_at_native_width_in_fp8(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
) -> None:
    native = {"RIG_SHIM_DIFFUSION": "0"}
    stock = inside(tree, XDIT_STRATEGY="off", **native)
    ranks = inside(tree, XDIT_GPUS="cpu:7", **STRICT, **native)
    path = flux_dev(hidden=3072, double=1, single=1)
    case = {"height": 12, "width": 11, "batch": 1, "text_tokens": 77}
    fp8 = {"dtype": "float8_e4m3fn"}
    error, before, after = compare(stock, ranks, path, tmp_path, options=fp8, **case)
    assert error <= BOUND
    assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1


WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": "float8_e4m3fn"},
    "fp8_e4m3fn_fast": {"dtype": "float8_e4m3fn", "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": "float8_e5m2"},
}


@pytest.mark.group("3")
@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_every_weight_dtype_of_unetloader_equals_stock(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    name: str,
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    path = flux_dev(hidden=512, double=1, single=1)
    error, before, after = compare(
        stock, ranks, path, tmp_path, options=WEIGHT_DTYPES[name], **SMALL
    )
    assert error <= BOUND
    assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1


@pytest.mark.group("peak")
@pytest.mark.newest_only
def test_each_ranks_peak_of_activations_is_about_its_share(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off", **MALLOC)
    path = flux_dev(hidden=768, double=1, single=1)
    case = {"height": 72, "width": 72, "batch": 1, "text_tokens": 256}
    whole = stock.call("forwards:peak_bytes", path=path, **case)
    for num_ranks in (2, 4) if is_whole() else (4,):
        ranks = inside(tree, XDIT_GPUS=f"cpu:{num_ranks}", **STRICT, **MALLOC)
        peaks = ranks.call("forwards:rank_peak_bytes", path=path, **case)
        shares = [round(peak / whole, 3) for peak in peaks]
        record_property(f"{num_ranks} ranks", {"stock MiB": whole >> 20, "shares": shares})
        # Above 1/N by the send and receive buffers of q, k and v in one all-to-all.
        assert max(shares) <= 1.4 / num_ranks, shares

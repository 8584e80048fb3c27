"""Bytes of every strategy: the table of the study that the formulas come from, in GB."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.planning.cost.known_models import MODELS
from comfy_xdit_patch.planning.cost.rank_time import (
    fsdp_bytes,
    pipefusion_bytes,
    ring_bytes,
    tensor_bytes,
    ulysses_bytes,
)

# model, tokens, ranks, Ulysses, ring, tensor, PipeFusion, fsdp in bf16
TABLE = [
    ("flux1-dev", 1536, 4, 0.40, 0.81, 1.08, 0.009, 17.85),
    ("flux1-dev", 4608, 2, 1.61, 1.61, 2.15, 0.03, 11.90),
    ("flux1-dev", 4608, 4, 1.21, 2.42, 3.23, 0.03, 17.85),
    ("flux1-dev", 4608, 8, 0.71, 2.82, 3.77, 0.03, 20.83),
    ("flux1-dev", 8704, 8, 1.33, 5.33, 7.11, 0.05, 20.83),
    ("flux1-dev", 66048, 8, 10.12, 40.48, 53.97, 0.41, 20.83),
    ("flux2-dev", 4608, 4, 2.38, 4.76, 5.44, 0.06, 48.33),
    ("flux2-dev", 16896, 8, 5.09, 20.35, 23.25, 0.21, 56.39),
]


@pytest.mark.parametrize(
    ("name", "tokens", "n", "ulysses", "ring", "tensor", "pipefusion", "fsdp"), TABLE
)
def test_bytes_are_those_of_the_table(name, tokens, n, ulysses, ring, tensor, pipefusion, fsdp):
    shape = MODELS[name]
    values, blocks = tokens * shape.width, shape.num_blocks
    gb = 1e9
    assert ulysses_bytes(values / n, n, blocks) / gb == pytest.approx(ulysses, abs=0.006)
    assert ring_bytes(values / n, n, blocks) / gb == pytest.approx(ring, abs=0.006)
    assert tensor_bytes(values, n, shape.num_gathers) / gb == pytest.approx(tensor, abs=0.006)
    assert pipefusion_bytes(values) / gb == pytest.approx(pipefusion, abs=0.006)
    assert fsdp_bytes(2 * shape.num_weights, n) / gb == pytest.approx(fsdp, abs=0.006)


@pytest.mark.parametrize(("u", "r", "expected"), [(2, 2, 1.61), (2, 4, 1.61), (4, 2, 1.01)])
def test_ulysses_and_ring_together_send_the_sum_of_their_parts(u, r, expected):
    values = 4608 * 3072 / (u * r)
    assert (ulysses_bytes(values, u, 57) + ring_bytes(values, r, 57)) / 1e9 == pytest.approx(
        expected, abs=0.006
    )


def test_one_rank_sends_nothing():
    assert ulysses_bytes(1e6, 1, 57) == ring_bytes(1e6, 1, 57) == 0
    assert tensor_bytes(1e6, 1, 76) == fsdp_bytes(1e9, 1) == 0

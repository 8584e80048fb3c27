"""Latents are compared by value; what proves nothing is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from comfy_xdit_patch.check.comparison import LATENT_KEY, compare, read_latent
from comfy_xdit_patch.errors import CheckError


def test_the_error_is_relative_to_the_largest_value_and_psnr_to_the_range():
    stock = torch.tensor([-4.0, 0.0, 4.0, 2.0], dtype=torch.float64)
    difference = compare(stock, stock + torch.tensor([0.0, 0.0, 0.0, 0.4]))
    assert difference.max_error == pytest.approx(0.1)
    assert difference.psnr_db == pytest.approx(32.04, abs=0.01)  # 20 log10(8 / 0.2)
    assert compare(stock, stock).psnr_db is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [([1.0, float("nan")], "NaN or infinity"), ([2.0, 2.0], "the same everywhere")],
)
def test_a_latent_that_proves_nothing_is_refused(tmp_path, values, reason):
    save_file({LATENT_KEY: torch.tensor(values)}, tmp_path / "a.latent")
    with pytest.raises(CheckError, match=reason):
        read_latent(tmp_path / "a.latent")

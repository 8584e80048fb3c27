"""What modulation sharding takes for granted of torch's kernels: outputs do not depend on others.

At the width of FLUX.1, whose linears of modulation have one row for each image.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from comfy_xdit_patch.planning.tensor_cuts import Cut, Part

WIDTH = 3072
CUT = Cut("modulation.lin", 0, (Part(3 * WIDTH // 64, 64),), "gathered")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_some_outputs_of_a_linear_have_the_bits_that_they_have_among_all(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * WIDTH, WIDTH, generator=generator).mul_(WIDTH**-0.5).to(dtype)
    bias = torch.randn(3 * WIDTH, generator=generator).to(dtype)
    for num_rows in (1, 2, 4):
        rows = torch.randn(num_rows, 1, WIDTH, generator=generator).to(dtype)
        whole = F.linear(rows, weight, bias)
        for num_ranks in (2, 3, 4, 8):
            sizes = CUT.sizes(num_ranks)
            parts = zip(weight.split(sizes), bias.split(sizes), strict=True)
            # Weights of their own, as a rank has them: kernels look at where memory begins.
            joined = [F.linear(rows, part.clone(), more.clone()) for part, more in parts]
            assert torch.equal(torch.cat(joined, -1), whole), (num_rows, num_ranks)

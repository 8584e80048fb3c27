"""Bodies about scales that are taken over a whole input, computed on shards of it.

Runs in: a ComfyUI process of ``process.py``, one for each rank.
"""

from __future__ import annotations

from typing import Any

import comfy.quant_ops
import torch
import torch.distributed as dist

from comfy_xdit_patch.worker.shard.quantised import whole_input_scales


def nvfp4_scale(*, rank: int, world_size: int, store: str, dtype: str) -> dict[str, Any]:
    """Quantise this rank's rows of one input as a layer of nvfp4 without input scale does."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
    )
    try:
        generator = torch.Generator().manual_seed(7)
        whole = torch.randn(48, 64, generator=generator).to(getattr(torch, dtype))
        whole[40, 3] = 50.0  # the last rank alone has the largest value
        mine = torch.tensor_split(whole, world_size)[rank]
        layout = comfy.quant_ops.TensorCoreNVFP4Layout
        expected = float(layout.quantize(whole)[1].scale)
        alone = float(layout.quantize(mine)[1].scale)
        with whole_input_scales():
            got = float(layout.quantize(mine)[1].scale)
            given = float(layout.quantize(mine, scale=torch.tensor(0.5))[1].scale)
        after = float(layout.quantize(mine)[1].scale)
    finally:
        dist.destroy_process_group()
    return {"whole": expected, "alone": alone, "ranks": got, "given": given, "after": after}

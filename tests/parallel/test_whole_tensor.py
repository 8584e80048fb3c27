"""A quantised layer that looks at its whole input sees the whole, and not a rank's shard."""

from __future__ import annotations

from pathlib import Path

import pytest
from inside.client import Inside
from rig.trees import Tree

NUM_RANKS = 3


@pytest.mark.newest_only
@pytest.mark.needs("comfy/quant_ops.py", "TensorCoreNVFP4Layout")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nvfp4_scales_its_input_as_on_one_rank(tree: Tree, tmp_path: Path, dtype: str) -> None:
    processes = [Inside(tree, {"XDIT_STRATEGY": "off"}) for _ in range(NUM_RANKS)]
    try:
        for rank, process in enumerate(processes):
            process.start_call(
                "scales:nvfp4_scale",
                rank=rank,
                world_size=NUM_RANKS,
                store=str(tmp_path / "store"),
                dtype=dtype,
            )
        results = [process.finish_call() for process in processes]
    finally:
        for process in processes:
            process.close()
    for result in results:
        assert result["ranks"] == result["whole"], "every rank takes the whole input's scale"
        assert result["given"] == 0.5, "a scale from the file is left alone"
        assert result["after"] == result["alone"], "and ComfyUI's own function is back"
    assert any(result["alone"] != result["whole"] for result in results), "a shard differs"

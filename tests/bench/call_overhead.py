"""What one parallel call costs beside the model: message, copies, wake-up.

Runs in: the rig's environment; ComfyUI and its ranks are processes of their own.

A 1024 x 1024 latent and FLUX.1's real conditioning sizes (256 text tokens of 4096), a model so
narrow that its own time hardly matters. The host's time of a step minus the slowest rank's, which
counts from the arrival of the message to the written result.
"""

from __future__ import annotations

import tempfile

from bench.rows import Row, compared
from inside.client import Inside
from rig.trees import Tree

NUM_RANKS = 2
NUM_WARM_UP, QUICK_CALLS = 3, 10


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """The part of a call outside of the ranks, against the ranks' part of the same call."""
    num_calls = QUICK_CALLS if is_quick else 40
    inside = Inside(tree, {"XDIT_GPUS": f"cpu:{NUM_RANKS}", "XDIT_START_TIMEOUT": "400"})
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/narrow.safetensors"
            model = {"family": "dev", "hidden": 128, "double": 1, "single": 1, "context": 4096}
            inside.call("families:write_model", path=path, **model)
            sizes = {"height": 128, "width": 128, "batch": 1, "text_tokens": 256}
            times = inside.call(
                "forwards:run_of_calls", path=path, calls=num_calls + NUM_WARM_UP, **sizes
            )[NUM_WARM_UP:]
    finally:
        inside.close()
    slowest = [1000 * max(t["ranks"]) for t in times]
    outside = [1000 * t["host"] - ranks for t, ranks in zip(times, slowest, strict=True)]
    name = f"call of {NUM_RANKS} CPU ranks, 1024 px, width 128: outside of the ranks against inside"
    return [compared(name, "ms", outside, slowest)]

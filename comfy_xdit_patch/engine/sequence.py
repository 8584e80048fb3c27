"""Join the shards of a token sequence again.

Runs in: worker process.

Dimension letters in this file
    B  batch
    S  sequence, all tokens of it
    L  local sequence, this rank's shard of S
    N  ranks
    D  features of a token

Shards may differ by a token, and are never padded for attention. A 1024 px image is 4096 tokens;
three GPUs get 1366, 1365 and 1365. A padded token would be a real key: with no mask, softmax gives
it weight and every row of the output moves.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from comfy_xdit_patch.engine import collectives

SEQUENCE_DIM = 1


def gather_sequence(
    x_BLD: torch.Tensor, *, sizes: tuple[int, ...], group: dist.ProcessGroup
) -> torch.Tensor:
    """Join the shards of all ranks, in rank order.

    Args:
        sizes: length of each rank's shard. Passed in, not communicated: each rank already knows
            it from the plan, and a size exchange would cost a second collective.

    Shapes:
        ``x_BLD`` (B, L, D) -> (B, S, D)

    Collective:
        Every rank of ``group`` must call this, in the same order.
    """
    missing = max(sizes) - x_BLD.shape[SEQUENCE_DIM]
    # Padding for the wire only. Gloo refuses unequal sizes and NCCL turns them into one
    # broadcast per rank (pytorch/pytorch#156627, NVIDIA/nccl#773).
    wire_BLD = (F.pad(x_BLD, (0, 0, 0, missing)) if missing else x_BLD).contiguous()
    num_ranks, shape = len(sizes), wire_BLD.shape
    arrived = wire_BLD.new_empty((num_ranks * shape[0], *shape[1:]))
    collectives.all_gather_into(arrived, wire_BLD, group=group)
    shards_NBLD = arrived.view(num_ranks, *shape)
    if min(sizes) == max(sizes):
        return shards_NBLD.transpose(0, 1).flatten(1, 2)  # for one row a view
    trimmed = [
        shard.narrow(SEQUENCE_DIM, 0, size)
        for shard, size in zip(shards_NBLD.unbind(), sizes, strict=True)
    ]
    return torch.cat(trimmed, dim=SEQUENCE_DIM)

"""Ring attention: keys and values go round, queries stay.

Runs in: worker process.

Dimension letters in this file
    B  batch
    G  heads of this rank and of all others in its ring
    L  local sequence: queries of this rank
    K  head width

Each rank attends to the keys that it has while it sends them on and receives the next ones. What it
gets for each part of the keys is joined by log-sum-exp, which is exact (docs/adr/0014). Parts need
not be of one size: every rank knows all sizes from the plan.

Source: Ring Attention, arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from comfy_xdit_patch.worker.attention.lse import Bias, JoinedParts, attention_with_lse
from comfy_xdit_patch.worker.ranks import collectives


def ring_attention(
    q_BGLK: torch.Tensor,
    k_BGLK: torch.Tensor,
    v_BGLK: torch.Tensor,
    *,
    num_keys: Sequence[int],
    index: int,
    group: dist.ProcessGroup,
    bias_of: Callable[[int], Bias | None],
    scale: float | None = None,
) -> tuple[torch.Tensor, int]:
    """Attend to the keys of all ranks in a ring.

    Args:
        num_keys: how many every rank of the ring has.
        index: this rank's place in the ring.
        bias_of: the mask of this rank's queries and another one's keys.

    Returns:
        Output (B, G, L, K), and the bytes that this rank sent.

    Collective:
        Every rank of the ring must call this, in the same order.
    """
    joined, bytes_sent = JoinedParts(), 0
    present = torch.stack((k_BGLK, v_BGLK))
    for step in range(len(num_keys)):
        source = (index - step) % len(num_keys)
        incoming, works = present, []
        if step + 1 < len(num_keys):
            size = list(present.shape)
            size[3] = num_keys[source - 1]
            incoming = present.new_empty(size)
            works = collectives.pass_on_async(
                incoming,
                present,
                to=(index + 1) % len(num_keys),
                source=(index - 1) % len(num_keys),
                group=group,
            )
            bytes_sent += present.nbytes
        key, value = present.unbind()
        joined.add(*attention_with_lse(q_BGLK, key, value, bias=bias_of(source), scale=scale))
        if works:
            collectives.finish(works)
        present = incoming
    return joined.result(q_BGLK.dtype), bytes_sent

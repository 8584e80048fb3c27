"""ComfyUI's own VAE decoder on one rank's lines of a picture.

Runs in: worker process.

A rank has some of the lines of the latent from the first layer to the last. What a layer needs of
the other lines it gets from other ranks, and nothing else differs from ComfyUI alone:

    convolution 3 x 3    the line above and the line below, of the neighbours; zeros at the edges
    group norm           sums over all lines: means and variances are those of the whole picture
    attention            keys and values of all lines; queries of its own
    all else             works on one pixel, or doubles it
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.planning.sequence_shares import bounds, shard_sizes
from comfy_xdit_patch.wire.decoders import ATTENTION
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.shard.rank_tokens import gather_sequence

LINES_DIM = 2  # of (B, C, lines, width)


class Lines:
    """The lines of one picture, as all ranks share them."""

    def __init__(self, groups: Groups) -> None:
        group = groups.everyone
        assert group is not None, "a world of one rank shares nothing"
        self._group = group
        self._rank = groups.rank
        self._world_size = groups.world_size
        self._counts: tuple[int, ...] = ()
        """Lines of the latent, by rank."""
        self.bytes_sent = 0
        """By this rank to others, since it began."""

    def begin(self, num_lines: int) -> tuple[int, int]:
        """Share the lines of a latent; return the first of this rank's, and the end."""
        self._counts = shard_sizes(num_lines, self._world_size)
        return bounds(self._counts)[self._rank]

    def with_neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """Return the lines (B, C, L, W) with the one above and the one below, (B, C, L + 2, W)."""
        above, below = (x.new_zeros((*x.shape[:2], 1, x.shape[3])) for _ in range(2))
        edges = [
            (self._rank - 1, x[:, :, :1].contiguous(), above),
            (self._rank + 1, x[:, :, -1:].contiguous(), below),
        ]
        edges = [edge for edge in edges if 0 <= edge[0] < self._world_size]
        collectives.finish(collectives.swap_async(edges, group=self._group))
        self.bytes_sent += sum(sent.nbytes for _, sent, _ in edges)
        return torch.cat([above, x, below], dim=LINES_DIM)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' values, the same bits on each."""
        collectives.all_reduce_sum(values, group=self._group)
        self.bytes_sent += values.nbytes
        return values

    def part(self) -> float:
        """Return how much of the picture this rank has, 0 to 1."""
        return self._counts[self._rank] / sum(self._counts)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the lines (B, C, L, W) of the latent's size, (B, C, S, W)."""
        lines_BLD = x.transpose(1, LINES_DIM).flatten(2)
        whole_BSD = gather_sequence(lines_BLD, sizes=self._counts, group=self._group)
        sent = max(self._counts) * x.nbytes // x.shape[LINES_DIM]
        self.bytes_sent += sent * (self._world_size - 1)
        whole = whole_BSD.reshape(*whole_BSD.shape[:2], x.shape[1], x.shape[3])
        return whole.transpose(1, LINES_DIM).contiguous()


def share(decoder: Any, lines: Lines) -> None:
    """Have a decoder compute this rank's lines, once and for all."""
    for module in decoder.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            module.padding = (0, 1)
            module.register_forward_pre_hook(partial(_neighbours_first, lines))
        elif isinstance(module, torch.nn.GroupNorm):
            module.forward = partial(group_norm, module, lines)  # type: ignore[method-assign]
        elif hasattr(module, ATTENTION):
            setattr(module, ATTENTION, partial(attend, getattr(module, ATTENTION), lines))


def _neighbours_first(lines: Lines, _: Any, args: tuple[torch.Tensor]) -> torch.Tensor:
    return lines.with_neighbours(*args)


def group_norm(norm: torch.nn.GroupNorm, lines: Lines, x: torch.Tensor) -> torch.Tensor:
    """Normalize the lines (B, C, L, W) by mean and variance of whole groups of the picture.

    Sums of a line are float32, those of lines and ranks float64: 8e-9 off, in a twentieth of the
    time of ``torch.var_mean`` on a CPU.
    """
    groups = (x.shape[0], norm.num_groups, -1)
    sums = x.sum(3, dtype=torch.float32).double()
    squares = torch.linalg.vector_norm(x, dim=3, dtype=torch.float32).double().square()
    both = torch.stack([part.reshape(groups).sum(2) for part in (sums, squares)])
    num_values = x[0].numel() / norm.num_groups / lines.part()
    mean, square = lines.summed(both) / num_values
    width = x.shape[1] // norm.num_groups
    means = mean.float().repeat_interleave(width, dim=1)
    variances = (square - mean**2).clamp(min=0).float().repeat_interleave(width, dim=1)
    weight, bias = norm.weight.float(), norm.bias.float()
    rows = [
        # With means and variances that are given it does just this to each channel, in one kernel.
        torch.nn.functional.batch_norm(
            x[row : row + 1], means[row], variances[row], weight, bias, eps=norm.eps
        )
        for row in range(len(x))
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def attend(
    attention: Any, lines: Lines, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Run ComfyUI's attention of the lines' queries (B, C, L, W) over the whole picture."""
    from comfy.ldm.modules.diffusionmodules import model

    k, v = lines.whole(torch.cat([k, v], dim=1)).chunk(2, dim=1)
    if attention is model.normal_attention:
        # It gives its result the shape of the keys; what it calls leaves the rest of it empty.
        queries = q.flatten(LINES_DIM)
        attended = model.slice_attention(
            queries.transpose(1, 2), k.flatten(LINES_DIM), v.flatten(LINES_DIM)
        )
        out: torch.Tensor = attended[:, :, : queries.shape[LINES_DIM]].reshape(q.shape)
    else:
        out = attention(q, k, v)
    return out

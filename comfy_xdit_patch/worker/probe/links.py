"""Time exchanges between all ranks, as plans would make them.

Runs in: worker process.

All of them are made in the one group of all ranks, with nothing for those who are in another group
of a grouping: a group of its own for each would cost NCCL's time and memory, and carry the same.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.cost.link_timing import (
    Form,
    Grouping,
    groups_of,
    measurements,
    name_of,
)
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import Groups

SIZES_BYTES = {"cuda": (1 << 16, 1 << 20, 1 << 24), "cpu": (1 << 14, 1 << 18, 1 << 21)}
"""What each rank sends. Ulysses at 1024 px on 4 GPUs sends 5 MB in each exchange."""
NUM_SAMPLES = 5
MAX_RUNS = 8
SAMPLE_S = 5e-3
VALUE_BYTES = 4


class LinkProbe:
    """One rank's part in all exchanges. Memory is taken at once, before anybody waits for it."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._sizes = SIZES_BYTES[groups.device.type]
        num_values = 2 * self._sizes[-1] // VALUE_BYTES  # an all-gather has a part of its own too
        self._sent = torch.zeros(num_values, dtype=torch.float32, device=groups.device)
        self._arrived = torch.empty_like(self._sent)

    def times(self, budget_s: float) -> dict[str, list[list[float]]]:
        """Time everything: pairs of bytes and seconds, by name.

        The largest size is left out where it would take more than its part of the time. What
        decides is the slowest rank's time, so all ranks decide alike.

        Collective: every rank calls this.
        """
        group = self._groups.everyone
        todo = measurements(self._groups.world_size)
        if group is None or not todo:
            return {}
        found = {}
        for form, grouping in todo:
            points: list[list[float]] = []
            for size in self._sizes:
                if len(points) > 1:
                    runs = 2 + NUM_SAMPLES
                    expected_s = points[-1][1] * size / points[-1][0] * runs
                    if self._agreed(expected_s) > budget_s / len(todo):
                        break
                points.append([float(size), self._time(form, grouping, size, group)])
            found[name_of(form, grouping)] = points
        return found

    def _time(self, form: Form, grouping: Grouping, size: int, group: dist.ProcessGroup) -> float:
        """Return the median of a few samples."""
        self._exchange(form, grouping, size, group)
        begin = time.perf_counter()
        self._exchange(form, grouping, size, group)
        once_s = self._agreed(time.perf_counter() - begin)
        num_runs = min(MAX_RUNS, max(1, int(SAMPLE_S / once_s)))
        samples = []
        for _ in range(NUM_SAMPLES):
            begin = time.perf_counter()
            for _ in range(num_runs):
                self._start(form, grouping, size, group)
            self._wait()
            samples.append((time.perf_counter() - begin) / num_runs)
        return statistics.median(samples)

    def _exchange(
        self, form: Form, grouping: Grouping, size: int, group: dist.ProcessGroup
    ) -> None:
        self._start(form, grouping, size, group)
        self._wait()

    def _start(self, form: Form, grouping: Grouping, size: int, group: dist.ProcessGroup) -> None:
        """Begin an exchange in which every rank sends ``size`` bytes. A CPU rank also ends it."""
        rank, world_size = self._groups.rank, self._groups.world_size
        mine = next(each for each in groups_of(world_size, grouping) if rank in each)
        part = size // VALUE_BYTES // (len(mine) - 1)
        if form == "all_to_all":
            parts = [part if r in mine and r != rank else 0 for r in range(world_size)]
            data, out = self._sent[: sum(parts)], self._arrived[: sum(parts)]
            collectives.all_to_all(out, data, received=parts, sent=parts, group=group)
        elif form == "pass_on":
            num_values, index = size // VALUE_BYTES, mine.index(rank)
            works = collectives.pass_on_async(
                self._arrived[:num_values],
                self._sent[:num_values],
                to=mine[(index + 1) % len(mine)],
                source=mine[index - 1],
                group=group,
            )
            collectives.finish(works)
        else:
            whole = self._arrived[: part * world_size]
            collectives.all_gather_into(whole, self._sent[:part], group=group)

    def _agreed(self, seconds: float) -> float:
        """Return the longest time that any rank has. Collective."""
        value = torch.tensor([seconds], dtype=torch.float64, device=self._groups.device)
        collectives.all_reduce_max(value)
        return float(value.item())

    def _wait(self) -> None:
        if self._groups.device.type == "cuda":
            torch.cuda.synchronize(self._groups.device)

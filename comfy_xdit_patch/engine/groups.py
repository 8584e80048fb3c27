"""Process groups of a plan, made by xfuser.

Runs in: worker process. One of two files that import xfuser.

Groups are made once for each grid shape and kept: ComfyUI changes the batch from call to call, and
xfuser's own ``initialize_model_parallel`` holds one grid at a time and costs 0.2 s to change.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from comfy_xdit_patch.engine.listeners import refuse_strangers
from comfy_xdit_patch.planning.plan import ParallelPlan


@dataclass(frozen=True, slots=True)
class PlanGroups:
    """The groups of one rank under one plan. None where an axis has one rank.

    ``sequence`` shares the tokens of a row; ``ulysses`` and ``ring`` are the axes of its own grid.
    ``pipeline`` has one rank of each stage. ``tensor`` shares heads and columns of the same tokens.
    """

    sequence: dist.ProcessGroup | None
    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None
    pipeline: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None


class Groups:
    """This rank's membership in the world, and in the groups of every plan used so far."""

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._by_grid: dict[tuple[int, ...], PlanGroups] = {}
        self._by_ranks: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
        self._weights: dist.ProcessGroup | None = None

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """All ranks, as a plan with no other axis than the sequence has them. None: only one."""
        return self.of_plan(ParallelPlan(self.world_size, 1, self.world_size)).sequence

    @property
    def weights(self) -> dist.ProcessGroup:
        """All ranks, for weight shards. Apart from the others: NCCL queues what shares a group."""
        assert self._weights is not None, "made by join"
        return self._weights

    @classmethod
    def join(
        cls,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        store_fd: int,
        join_timeout_s: float,
        step_timeout_s: float,
    ) -> Groups:
        """Join the world. Collective: every rank calls this.

        The store is a file without a name that all workers inherited: no port, nothing left
        behind. (``FileStore`` opens its path anew for every access, which /proc allows; measured:
        8 gloo ranks join in 0.3 s.)
        """
        store = dist.FileStore(f"/proc/self/fd/{store_fd}", world_size)  # type: ignore[attr-defined]
        store.set_timeout(datetime.timedelta(seconds=join_timeout_s))
        dist.init_process_group(
            _backend(device),
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=step_timeout_s),
        )
        groups = cls(rank=rank, world_size=world_size, device=device)
        groups.of_plan(ParallelPlan(world_size, 1, world_size))
        groups._weights = dist.new_group(
            timeout=datetime.timedelta(seconds=step_timeout_s), backend=_backend(device)
        )
        groups._close_the_door()
        return groups

    def of_plan(self, plan: ParallelPlan) -> PlanGroups:
        """Return the groups of a plan. Collective when the grid shape is new."""
        if plan.grid not in self._by_grid:
            self._by_grid[plan.grid] = self._make(plan)
            self._close_the_door()
        return self._by_grid[plan.grid]

    def leave(self) -> None:
        """Leave all groups."""
        self._by_grid.clear()
        self._by_ranks.clear()
        dist.destroy_process_group()

    def _close_the_door(self) -> None:
        # NCCL connects ranks when they first use a group, so it cannot be kept from listening.
        if self.device.type == "cpu":
            refuse_strangers()

    def _make(self, plan: ParallelPlan) -> PlanGroups:
        if plan.sequence_degree == plan.pipefusion_degree == plan.tensor_degree == 1:
            return PlanGroups(sequence=None, ulysses=None, ring=None)
        from xfuser.core.distributed.utils import RankGenerator

        degree, ulysses = plan.sequence_degree, plan.ulysses_degree
        grid = RankGenerator(
            plan.tensor_degree,
            degree,
            plan.pipefusion_degree,
            1,
            plan.batch_degree,
            1,
            "tp-sp-pp-cfg-dp",
        )
        tensor = [tuple(ranks) for ranks in grid.get_ranks("tp")]
        rows = [tuple(ranks) for ranks in grid.get_ranks("sp")]
        near = [ranks[i : i + ulysses] for ranks in rows for i in range(0, degree, ulysses)]
        far = [ranks[i::ulysses] for ranks in rows for i in range(ulysses)]
        stages = [tuple(ranks) for ranks in grid.get_ranks("pp")]
        return PlanGroups(
            sequence=self._group(rows) if degree > 1 else None,
            ulysses=self._group(near) if ulysses > 1 else None,
            ring=self._group(far) if plan.ring_degree > 1 else None,
            pipeline=self._group(stages) if plan.pipefusion_degree > 1 else None,
            tensor=self._group(tensor) if plan.tensor_degree > 1 else None,
        )

    def _group(self, lists: Sequence[tuple[int, ...]]) -> dist.ProcessGroup:
        """Return this rank's group among those lists of ranks."""
        key = tuple(lists)
        if key not in self._by_ranks:
            from xfuser.core.distributed.parallel_state import init_model_parallel_group

            # "data" is xfuser's plain coordinator. Its "sequence" one wants Ulysses and ring groups
            # of yunchang, which is a process-wide global: one grid only.
            coordinator = init_model_parallel_group(
                group_ranks=[list(ranks) for ranks in lists],
                local_rank=self.device.index or 0,
                backend=_backend(self.device),
                parallel_mode="data",
            )
            self._by_ranks[key] = coordinator.device_group
        return self._by_ranks[key]


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"

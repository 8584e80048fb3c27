"""The part of the status object that tells about the workers.

Runs in: host process.
"""

from __future__ import annotations

from typing import Any

from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.workers.pool import Pool


def pool_status(pool: Pool, totals: Totals) -> dict[str, Any]:
    """State of the pool and of each rank, as JSON."""
    last = totals.last_run
    workers = pool.workers  # Once: the keeper's thread may take them away any time.
    ranks = []
    for rank, device in enumerate(pool.devices):
        joined = pool.joined.get(rank)
        alive = rank < len(workers) and workers[rank].process.poll() is None
        ranks.append(
            {
                "rank": rank,
                "pid": joined.pid if joined and alive else None,
                "device": device.name,
                "state": "ready" if alive else pool.state.value,
                "forwards": totals.num_forwards.get(rank, 0),
                "log": str(workers[rank].log_path) if alive else None,
                "start_s": joined.seconds if joined else None,
                "weight_bytes": totals.weight_bytes.get((pool.generation, rank)) if alive else None,
                "load_s": totals.load_seconds.get(rank),
                "busy_s": totals.busy_seconds.get(rank),
                "is_launch_bound": totals.launch_bound.get(rank),
            }
        )
    plan = None
    if last is not None and last.plan is not None:
        plan = {"strategy": last.strategy, "world_size": last.ranks, "degrees": last.plan}
    return {
        "state": pool.state.value,
        "reason": pool.error,
        "plan": plan,
        "ranks": ranks,
        "start_s": round(pool.start_seconds, 3),
    }

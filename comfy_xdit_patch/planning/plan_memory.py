"""What a plan takes on each card, by the arithmetic of ``residency``.

Runs in: host, worker and the command line's process.
"""

from __future__ import annotations

from comfy_xdit_patch.planning.candidate import Candidate
from comfy_xdit_patch.planning.grid import num_communicators
from comfy_xdit_patch.planning.job import Job
from comfy_xdit_patch.planning.machine import Machine
from comfy_xdit_patch.planning.residency import Card, Need, TokenLoad, need_of


def need(plan: Candidate, job: Job, machine: Machine) -> Need:
    """Return the need of the card where it is tightest."""
    workload, shape = job.workload, job.shape
    value_bytes = job.precision.bytes_per_value
    sizes = shape.sizes(job.precision).part(1, plan.pipefusion * plan.tensor)
    kept = 0
    if plan.pipefusion > 1:
        blocks = -(-shape.num_blocks // plan.pipefusion)
        values = 2 * workload.batch_size * job.num_tokens * shape.width
        kept = blocks * values * value_bytes // (plan.batch * plan.sequence)
    load = TokenLoad(
        num_image_tokens=workload.num_image_tokens + workload.num_reference_tokens,
        num_text_tokens=workload.num_text_tokens,
        hidden_size=shape.width,
        # Rows are shared like tokens: a rank has 1/N of all, whichever axis gives it to the rank.
        # Ranks that cut the blocks hold all tokens of their part of the sequence.
        num_rows=workload.batch_size,
        bytes_per_value=value_bytes,
        kept_bytes=kept,
        num_shards=plan.batch * plan.sequence,
        num_groups=num_communicators(tuple(plan.degrees.values())),
    )
    cards = tuple(
        Card(gpu.memory_bytes, gpu.memory_bytes, has_host=plan.world_size > 1 and rank == 0)
        for rank, gpu in enumerate(machine.gpus)
    )
    return need_of(plan.weights, sizes, load, cards=cards)


def streamed_bytes(plan: Candidate, job: Job, machine: Machine) -> float:
    """Weights that a rank reads from CPU memory in every forward.

    Workers that offload stream all blocks. One GPU is ComfyUI itself, which streams what does not
    fit.
    """
    sizes = job.shape.sizes(job.precision)
    if plan.weights == "offload":
        return sizes.total_bytes - sizes.outside_blocks_bytes
    if plan.world_size == 1:
        alone = need(plan, job, machine)
        return max(0, alone.num_bytes - alone.card.free_bytes)
    return 0

"""Predict the time of one forward under a plan.

Runs in: the command line's process. Pure arithmetic, no torch.

    T = max(compute + exposed communication + bubble, host time)

    compute        of the slowest rank: ``rank_time``
    communication  exposed: all bytes of all-reduce; of all-to-all what outlasts the MLP's columns
                   in single blocks, and attention for one half of the heads in all blocks; what of
                   a ring's send outlasts the attention beside it, what of gathered weights outlasts
                   all compute, what shared modulation gives
    bubble         of PipeFusion, as the sampler waits for every step: (stages - 1) patches
    host time      launches in eager mode; they run beside the GPU until they are slower than it;
                   next to none where the forward is a CUDA graph

Constants, their sources, and how far published times are off: docs/planning.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from comfy_xdit_patch.planning.cost.candidate import Candidate
from comfy_xdit_patch.planning.cost.machine import RING_STEP_S, Machine
from comfy_xdit_patch.planning.cost.model_shape import CALLS_BESIDE_GRAPH, COMPUTE_BYTES, Job
from comfy_xdit_patch.planning.cost.rank_time import (
    ComputeTime,
    Part,
    compute_time,
    fsdp_bytes,
    modulation_bytes,
    pipefusion_bytes,
    ring_bytes,
    tensor_bytes,
    ulysses_bytes,
)
from comfy_xdit_patch.planning.family import HEAD_WIDTH
from comfy_xdit_patch.planning.grid import AXES
from comfy_xdit_patch.planning.sequence_shares import pays_in_halves, proportional
from comfy_xdit_patch.planning.transfers import transfer_bytes

MERGE_BYTES = 14
"""Merging two partial attentions, for each value: accumulator read and written in float32, a bf16
part read and widened."""

QUANTISE_BYTES = 16
"""What kernels read and write to make 8 bits of a value in bf16, and a value of these. Both kinds:
the largest of those with one scale 2, quotient 4, copy to what is sent 3. Then int8: rounding 4,
product 3; fp8: copy 3, product 4."""

INTERFERENCE = 0.1
"""Part of a hidden transfer that is felt all the same, as NCCL's kernels take some of the GPU.
Assumed; a transfer by the copy engine costs nothing."""

PATCH_COUNTS = (2, 4, 8, 16, 32)
"""Into how many patches PipeFusion may cut the tokens; the best is taken."""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one forward, in parts. ``host_s`` runs beside all of them."""

    compute_s: float
    communication_s: float
    bubble_s: float
    host_s: float
    num_patches: int = 1

    @property
    def gpu_s(self) -> float:
        return self.compute_s + self.communication_s + self.bubble_s

    @property
    def total_s(self) -> float:
        return max(self.gpu_s, self.host_s)

    @property
    def is_host_bound(self) -> bool:
        return self.host_s >= self.gpu_s


def predict(plan: Candidate, job: Job, machine: Machine, *, streamed_bytes: float = 0) -> Time:
    """Time one forward.

    Args:
        machine: with as many GPUs as the plan has ranks, in the plan's order.
        streamed_bytes: weights that each rank reads from CPU memory.
    """
    parts = _parts(plan, job, speeds(job, machine))
    counts = PATCH_COUNTS if plan.pipefusion > 1 else (1,)
    # Ranks whose launches set the pace launch nothing for what they could compute meanwhile.
    ways = (job, replace(job, overlaps=False)) if job.overlaps else (job,)
    times = [
        _time(plan, way, machine, streamed_bytes, [replace(part, num_patches=n) for part in parts])
        for n in counts
        for way in ways
    ]
    return min(times, key=lambda time: time.total_s)


def speeds(job: Job, machine: Machine) -> tuple[float, ...]:
    """Each GPU's speed at this job: one over its time alone."""
    alone = Part(num_rows=job.workload.batch_size)
    found = {gpu: 1 / compute_time(job, gpu, alone).total_s for gpu in set(machine.gpus)}
    return tuple(found[gpu] for gpu in machine.gpus)


def _time(
    plan: Candidate, job: Job, machine: Machine, streamed_bytes: float, parts: list[Part]
) -> Time:
    ranks = dict.fromkeys(zip(machine.gpus, parts, strict=True))  # of equal ranks one is enough
    computes = [compute_time(job, gpu, part) for gpu, part in ranks]
    compute = max(computes, key=lambda found: found.total_s)
    # Who holds most also sends most, and all wait for it.
    part = max(parts, key=lambda part: part.num_rows * part.stage * part.tokens)
    num_patches = part.num_patches

    fewest = round(min(part.heads for part in parts) * job.workload.num_heads)
    in_halves = (
        job.overlaps
        and plan.ring == plan.pipefusion == 1
        and pays_in_halves(fewest, part.num_rows * job.num_tokens)
    )
    communication_s = _sequence_s(plan, job, machine, part, compute, in_halves=in_halves)
    communication_s += _tensor_s(plan, job, machine, part)
    communication_s += _weights_s(plan, job, machine, compute, streamed_bytes)
    patch_s = (compute.total_s + communication_s) / num_patches
    bubble_s = 0.0
    if plan.pipefusion > 1:
        handed_s = _handed_s(plan, job, machine, part)
        communication_s += num_patches * max(0.0, handed_s - patch_s)
        bubble_s = (plan.pipefusion - 1) * (patch_s + handed_s)
    return Time(
        compute_s=compute.total_s,
        communication_s=communication_s,
        bubble_s=bubble_s,
        host_s=_host_s(plan, job, machine, part, in_halves=in_halves),
        num_patches=num_patches,
    )


def _parts(plan: Candidate, job: Job, weights: Sequence[float]) -> list[Part]:
    """Give every rank its part, in proportion to speed along each axis."""
    places = list(plan.places())
    speed: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for weight, place in zip(weights, places, strict=True):
        for depth in range(1, len(AXES)):
            speed[place[:depth]] += weight

    def along(axis: str, place: tuple[int, ...]) -> list[float]:
        """Speed at every index of an axis, of the ranks that share the indices before it."""
        before = place[: AXES.index(axis)]
        return [speed[(*before, index)] for index in range(getattr(plan, axis))]

    workload = job.workload
    rows = proportional(workload.batch_size, along("batch", places[0]), minimum=1)
    found = []
    for place in places:
        batch, stage, column, share, tensor = place
        stages, columns = along("pipefusion", place), along("ring", place)
        shares = along("ulysses", place)
        ring = columns[column] / sum(columns)
        heads = proportional(workload.num_heads, [w for w in shares for _ in range(plan.tensor)])
        found.append(
            Part(
                num_rows=rows[batch],
                stage=stages[stage] / sum(stages),
                tokens=ring * shares[share] / sum(shares),
                queries=ring,
                heads=heads[share * plan.tensor + tensor] / workload.num_heads,
                columns=1 / plan.tensor,
                modulation=plan.batch / plan.world_size if plan.weights == "modulation" else 1,
            )
        )
    return found


def _sequence_s(
    plan: Candidate,
    job: Job,
    machine: Machine,
    part: Part,
    compute: ComputeTime,
    *,
    in_halves: bool,
) -> float:
    """Ulysses and ring, with what hides behind columns and attention taken off."""
    blocks = job.shape.num_blocks * part.stage
    values = part.num_rows * job.num_tokens * job.shape.width * part.tokens * part.columns
    value_bytes = job.precision.bytes_per_value
    seconds = 0.0
    if plan.ulysses > 1:
        groups = plan.groups("ulysses")
        dtype = job.transfer_dtype if plan.exchanges_heads else "exact"
        head_bytes = transfer_bytes(
            HEAD_WIDTH, dtype, head_width=HEAD_WIDTH, value_bytes=value_bytes
        )
        num_bytes = ulysses_bytes(values, plan.ulysses, blocks, head_bytes / HEAD_WIDTH)
        if dtype != "exact":
            slowest = min(gpu.memory_bytes_per_s for gpu in machine.gpus)
            seconds += blocks * 4 * values * QUANTISE_BYTES / slowest
        num_parts = 2 if in_halves else 1
        calls = 2 * blocks * part.num_patches * num_parts
        transfer_s = machine.all_to_all_s(groups, num_bytes)
        has_later_columns = job.has_later_columns and plan.pipefusion == 1
        single = job.shape.num_single_blocks / job.shape.num_blocks
        columns_s = compute.linear_s * job.shape.later_part if has_later_columns else 0.0
        for of_blocks, meanwhile_s in ((single, columns_s), (1 - single, 0.0)):
            exposed_s = exposed_in_parts_s(
                of_blocks * transfer_s,
                meanwhile_s=meanwhile_s,
                attention_s=of_blocks * compute.attention_s,
                num_parts=num_parts,
            )
            seconds += exposed_s + INTERFERENCE * (of_blocks * transfer_s - exposed_s)
        seconds += calls * machine.latency_s(groups)
    if plan.ring > 1:
        groups = plan.groups("ring")
        steps = plan.ring - 1
        num_bytes = ring_bytes(values, plan.ring, blocks, value_bytes)
        step_s = machine.ring_s(groups, num_bytes) / steps
        seconds += steps * _exposed_s(step_s, behind=compute.attention_s / plan.ring)
        gpu = min(machine.gpus, key=lambda gpu: gpu.memory_bytes_per_s)
        merged = MERGE_BYTES + value_bytes - COMPUTE_BYTES
        seconds += steps * blocks * values * merged / gpu.memory_bytes_per_s
        seconds += steps * blocks * part.num_patches * RING_STEP_S
    return seconds


def _tensor_s(plan: Candidate, job: Job, machine: Machine, part: Part) -> float:
    if plan.tensor == 1:
        return 0.0
    groups = plan.groups("tensor")
    values = part.num_rows * job.num_tokens * job.shape.width * part.tokens
    gathers = job.shape.num_gathers * part.stage
    latency_s = gathers * part.num_patches * machine.latency_s(groups)
    num_bytes = tensor_bytes(values, plan.tensor, gathers, job.precision.bytes_per_value)
    return machine.ring_s(groups, num_bytes) + latency_s


def _weights_s(
    plan: Candidate, job: Job, machine: Machine, compute: ComputeTime, streamed_bytes: float
) -> float:
    """Weights that come from elsewhere while the blocks before them compute, or what they give."""
    if plan.weights == "sharded":
        sizes = job.shape.sizes(job.precision)
        blocks = sizes.total_bytes - sizes.outside_blocks_bytes
        everyone = [tuple(range(plan.world_size))]
        seconds = machine.ring_s(everyone, fsdp_bytes(blocks, plan.world_size))
        seconds += job.shape.num_blocks * machine.latency_s(everyone)
        return _exposed_s(seconds, behind=compute.total_s)
    if plan.weights == "modulation":
        everyone = [tuple(range(plan.world_size))]
        values = job.workload.batch_size * job.shape.num_modulation_outputs
        num_bytes = modulation_bytes(values, plan.world_size, job.precision.bytes_per_value)
        # Where ranks have different rows, these go round before what they give.
        num_gathers = 1 if plan.batch == 1 else 2
        return machine.ring_s(everyone, num_bytes) + num_gathers * machine.latency_s(everyone)
    return max(0.0, machine.from_host_s(streamed_bytes) - compute.total_s)


def exposed_in_parts_s(
    transfer_s: float, *, meanwhile_s: float, attention_s: float, num_parts: int
) -> float:
    """What Ulysses' transfers add, where heads are exchanged in parts, one after the other.

    Args:
        transfer_s: of q, k, v, three of the four tensors, and of the output.
        meanwhile_s: what is computed once q, k and v are on their way.
    """
    link_s, done_s = 3 / 4 * transfer_s, meanwhile_s
    for number in range(1, num_parts + 1):
        arrived_s = 3 / 4 * transfer_s * number / num_parts
        done_s = max(done_s, arrived_s) + attention_s / num_parts
        link_s = max(link_s, done_s) + transfer_s / 4 / num_parts
    return link_s - meanwhile_s - attention_s


def _exposed_s(transfer_s: float, *, behind: float) -> float:
    """What a transfer by NCCL adds to the compute that it runs beside."""
    return max(0.0, transfer_s - behind) + INTERFERENCE * min(transfer_s, behind)


def _handed_s(plan: Candidate, job: Job, machine: Machine, part: Part) -> float:
    """One patch from a stage to the next."""
    groups = plan.groups("pipefusion")
    values = part.num_rows * job.num_tokens * job.shape.width * part.tokens / part.num_patches
    latency_s = machine.latency_s(groups)
    num_bytes = pipefusion_bytes(values, job.precision.bytes_per_value)
    return machine.ring_s(groups, num_bytes) + latency_s


def _host_s(plan: Candidate, job: Job, machine: Machine, part: Part, *, in_halves: bool) -> float:
    is_whole = plan.weights in ("full", "modulation") and plan.pipefusion == 1
    if job.captures and is_whole and plan.world_size > 1:
        return CALLS_BESIDE_GRAPH * machine.host_call_s
    calls = job.execution.calls_per_block
    if plan.sequence * plan.tensor > 1:
        calls += job.execution.calls_per_attention
    if plan.ulysses > 1 and in_halves:
        calls += job.execution.calls_per_halves
    if plan.exchanges_heads and job.transfer_dtype != "exact":
        calls += job.execution.calls_per_quantised * (4 if in_halves else 2)
    calls *= job.shape.num_blocks * part.stage * part.num_patches
    if plan.ulysses > 1 and plan.pipefusion == 1 and job.has_later_columns:
        calls += job.execution.calls_per_later_columns * job.shape.num_single_blocks
    if plan.weights == "modulation":
        calls += job.execution.calls_per_shared_modulation
    return calls * machine.host_call_s

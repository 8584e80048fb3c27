"""Choose a plan: every legal one, its predicted time, and the cheapest of those asked for.

Runs in: the command line's process. Pure arithmetic, no torch.

``auto`` never chooses PipeFusion: its image is an approximation, which a user asks for by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.cost.candidate import SINGLE, Asked, Candidate, candidates
from comfy_xdit_patch.planning.cost.cost import Time, predict
from comfy_xdit_patch.planning.cost.machine import Machine
from comfy_xdit_patch.planning.cost.model_shape import Job
from comfy_xdit_patch.planning.pipeline import MIN_STEPS
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.residency import Card, Need, need_of, token_load

SAME_TIME = 0.02
"""Plans whose times differ by less are equal: one GPU is taken before several. Of several plans the
one with the fewest GPUs, or, where the CPU's launches set the pace of all, the one whose GPUs are
done first: on a faster CPU that is the fastest."""

MAX_NAMED = 8
"""Plans that a refusal names."""

AUTO = Asked()


@dataclass(frozen=True, slots=True)
class Option:
    """One plan that is legal and fits."""

    plan: Candidate
    time: Time
    need: Need
    speedup: float
    """Of one GPU's predicted time, as ComfyUI runs it."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """One plan that is not legal, or does not fit."""

    plan: Candidate
    refusal: Refusal
    is_legal: bool


@dataclass(frozen=True)
class Choice:
    """All plans, the fastest first, and the one that is taken."""

    options: tuple[Option, ...]
    dropped: tuple[Dropped, ...]
    chosen: Option

    @cached_property
    def single(self) -> Option:
        return next(option for option in self.options if option.plan == SINGLE)

    @property
    def why(self) -> str:
        """One sentence."""
        time = self.chosen.time
        if self.chosen.plan == SINGLE:
            others = (o for o in self.options if o.plan != SINGLE and AUTO.allows(o.plan))
            best = next((o for o in others if not is_by_name(o.plan, self.options)), None)
            if best is None:
                return "no plan of several GPUs is legal and fits"
            part = best.time.total_s / time.total_s
            return f"the best plan of several GPUs, {best.plan.name}, takes {part:.2f}x its time"
        text = f"{self.chosen.speedup:.2f}x of one GPU"
        if time.is_host_bound:
            return f"{text}; the CPU's launches set the pace, not the GPUs"
        return f"{text}; {time.communication_s / time.total_s:.0%} of it is communication"


def choose(job: Job, machine: Machine, asked: Asked = AUTO) -> Choice | Refusal:
    """Predict every plan, and take the cheapest of those asked for.

    Returns:
        A refusal if no plan that was asked for is legal and fits.
    """
    options: list[Option] = []
    dropped: list[Dropped] = []
    single_s = _time(SINGLE, job, machine.first(1)).total_s
    for plan in candidates(len(machine.gpus)):
        part = machine.first(plan.world_size)
        refusal = why_not(plan, job)
        if refusal is not None:
            dropped.append(Dropped(plan, refusal, is_legal=False))
            continue
        wanted, of_held = as_held(plan, job, part)
        if plan != SINGLE and not wanted.fits:
            misfit = Refusal(f"does not fit: {wanted.text}")
            dropped.append(Dropped(plan, misfit, is_legal=True))
            continue
        time = _time(plan, of_held, part)
        options.append(Option(plan, time, wanted, single_s / time.total_s))
    options.sort(key=lambda option: option.time.total_s)
    allowed = [
        option
        for option in options
        if asked.plan is not None or not is_by_name(option.plan, options)
        if asked.allows(option.plan)
    ]
    if not allowed:
        return _impossible(asked, options, dropped)
    return Choice(tuple(options), tuple(dropped), _cheapest(allowed))


def is_by_name(plan: Candidate, options: Sequence[Option]) -> bool:
    """Whether a plan is only taken by its degrees: to share modulation where whole weights fit."""
    whole = replace(plan, weights="full")
    return plan.weights == "modulation" and any(option.plan == whole for option in options)


def why_not(plan: Candidate, job: Job) -> Refusal | None:
    """Say why a plan is not legal for a job, on whatever machine."""
    workload, shape = job.workload, job.shape
    if plan.batch > 1 and not workload.is_batch_divisible:
        return Refusal("this batch cannot be shared: not every tensor has a row for each image")
    if plan.batch > workload.batch_size:
        return Refusal(
            f"batch={plan.batch} needs as many rows, and there are {workload.batch_size}"
        )
    fewest = min(workload.num_text_tokens, workload.num_image_tokens)
    if plan.sequence > fewest:
        return Refusal(f"{plan.sequence} shards of a sequence with {fewest} tokens of one kind")
    if plan.ulysses * plan.tensor > workload.num_heads:
        return Refusal(f"ulysses x tensor is more than the model's {workload.num_heads} heads")
    if plan.pipefusion > 1 and job.num_steps < MIN_STEPS:
        return Refusal(f"PipeFusion needs {MIN_STEPS} steps or more")
    if plan.weights == "modulation" and not shape.sizes(job.precision).modulation_bytes:
        return Refusal("the blocks have no modulation of their own that ranks could share")
    if plan.pipefusion > shape.num_blocks:
        return Refusal(f"pipefusion={plan.pipefusion} is more than the {shape.num_blocks} blocks")
    return None


def _time(plan: Candidate, job: Job, machine: Machine) -> Time:
    return predict(plan, job, machine, streamed_bytes=streamed_bytes(plan, job, machine))


def _cheapest(options: list[Option]) -> Option:
    """Take one of the plans that are as fast as the first."""
    limit = options[0].time.total_s * (1 + SAME_TIME)
    equal = [option for option in options if option.time.total_s <= limit]
    alone = [option for option in equal if option.plan == SINGLE]
    if alone:
        return alone[0]
    if options[0].time.is_host_bound:
        return min(equal, key=lambda option: option.time.gpu_s)
    return min(equal, key=lambda option: option.plan.world_size)


def _impossible(asked: Asked, options: list[Option], dropped: list[Dropped]) -> Refusal:
    why = next(
        (drop.refusal.reason for drop in dropped if asked.allows(drop.plan)),
        "there are too few GPUs",
    )
    possible = "; ".join(option.plan.name for option in options[:MAX_NAMED])
    return Refusal(
        f"{asked.text} is not possible here: {why}. Possible, the fastest first: {possible}"
    )


def as_held(plan: Candidate, job: Job, machine: Machine) -> tuple[Need, Job]:
    """Return what a plan needs, and the job that takes as long.

    Ranks that share the modulation by name hold weights cast, where that fits: they then compute as
    with a file of the dtype that they are cast to.
    """
    as_cast = job.precision.as_cast
    if (
        as_cast is not None
        and plan.weights == "modulation"
        and job.shape.sizes(job.precision).as_cast is not None
    ):
        wanted = need(replace(plan, weights="cast"), job, machine)
        if wanted.fits:
            return wanted, replace(job, precision=as_cast)
    return need(plan, job, machine), job


def need(plan: Candidate, job: Job, machine: Machine) -> Need:
    """Return the need of the card where it is tightest."""
    shape = job.shape
    load = token_load(
        ParallelPlan(*plan.grid),
        job.workload,
        num_blocks=shape.num_blocks,
        hidden_size=shape.width,
        bytes_per_value=job.precision.bytes_per_value,
    )
    sizes = shape.sizes(job.precision).part(1, plan.pipefusion * plan.tensor)
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

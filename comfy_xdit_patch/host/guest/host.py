"""Decide for each call of FLUX's forward: on the workers, or as ComfyUI does; and count it.

Runs in: host process. One object for the process, made when ComfyUI's modules are ready.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.boundary import theirs
from comfy_xdit_patch.host.decode.decoding import Decoding
from comfy_xdit_patch.host.pace.auto import Auto
from comfy_xdit_patch.host.pace.rank_speeds import CrewBalance
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.pool import Pool, PoolState
from comfy_xdit_patch.host.reading.eligibility import Pristine
from comfy_xdit_patch.host.reading.models import ModelRegistry
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.block_calls import DrivenForward
from comfy_xdit_patch.host.step.controlnets import ControlNets, RemoteControl
from comfy_xdit_patch.host.step.outcome import Books, Step
from comfy_xdit_patch.host.step.pipefusion import Pipelines
from comfy_xdit_patch.host.step.residuals_there import Residuals
from comfy_xdit_patch.host.step.step import ParallelSteps
from comfy_xdit_patch.host.step.whole_call import RemoteForward
from comfy_xdit_patch.host.weights.held import RemoteWeights
from comfy_xdit_patch.host.weights.holding import Holding
from comfy_xdit_patch.host.weights.one_owner import EVERYTHING, LeftOutHooks, SharedMemory
from comfy_xdit_patch.host.weights.residency import Residency
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.settings import Settings

log = logging.getLogger("comfy_xdit_patch")


class Host:
    """Everything of ours in ComfyUI's process."""

    def __init__(
        self,
        *,
        settings: Settings,
        pool: Pool,
        pristine: Pristine,
        before: Host | None = None,
        keeps_ranks: bool = False,
    ) -> None:
        """Make a host, in the place of ``before``, whose knowledge of models it keeps.

        Args:
            keeps_ranks: and what is known of the ranks too.
        """
        kept = before if keeps_ranks else None
        self.settings = settings
        self.pool = pool
        self.totals: Totals = before.totals if before else Totals()
        if not keeps_ranks:
            self.totals.begin_anew()
        self.models: ModelRegistry = before.models if before else ModelRegistry()
        self.hooks: LeftOutHooks = before.hooks if before else LeftOutHooks()
        self.base_model: ContextVar[Any] = ContextVar("base_model", default=None)
        self.current_run: ContextVar[Run | None] = ContextVar("run", default=None)
        self.is_inside: ContextVar[bool] = ContextVar("is_inside", default=False)
        """Whether this is inside of a call of FLUX that is seen and counted."""
        self.pristine = pristine
        self._weights: partial[RemoteWeights] = (
            kept._weights
            if kept
            else partial(
                RemoteWeights,
                totals=self.totals,
                models=self.models,
                failed={},
                verifies=settings.strict,
            )
        )
        balance: Callable[[Crew], CrewBalance] = (
            kept.holding.balance
            if kept and kept.settings.balance == settings.balance
            else partial(CrewBalance, mode=settings.balance, totals=self.totals)
        )
        self.memory = SharedMemory(pool.devices)
        self.holding: Holding = Holding(
            pool=pool,
            weights=self._weights,
            residency=partial(Residency, budget_bytes=settings.gpu_memory_bytes),
            memory=self.memory,
            totals=self.totals,
            pristine=pristine,
            models=self.models,
            strategy=settings.strategy,
            balance=balance,
            waits=settings.strict or not settings.starts_early,
        )
        self.auto = auto = Auto(settings, pool)
        self.books = Books(self.totals, pool=pool, auto=auto, is_strict=settings.strict)
        self.pipelines = Pipelines()
        self._steps = ParallelSteps(
            RemoteForward(self.totals, captures=settings.captures),
            DrivenForward(self.totals),
            holding=self.holding,
            pristine=pristine,
            totals=self.totals,
            hooks=self.hooks,
            auto=auto,
            pipelines=self.pipelines,
            transfer_dtype=settings.transfer_dtype,
        )
        self.controls: ControlNets = ControlNets(
            RemoteControl(self.totals),
            holding=self.holding,
            memory=self.memory,
            models=self.models,
            pristine=pristine,
            totals=self.totals,
            auto=auto,
            before=before.controls if before else None,
        )
        self.runs: list[Run] = []
        """Sampling runs of FLUX that go on; a sampler may begin another one inside of its own."""
        self._decoding = Decoding(
            pool=pool,
            pristine=pristine,
            totals=self.totals,
            memory=self.memory,
            measures=not settings.strict,
        )
        self.tiles = self._decoding.tiles
        self._lock = threading.RLock()

    def successor(self, devices: Sequence[Device], settings: Settings) -> Host:
        """Return a host for other devices or settings. To be called between runs."""
        with torch.inference_mode():  # As ComfyUI's prompts are executed, whatever thread this is.
            self.hooks.make_up()
        return Host(
            keeps_ranks=self.pool.change(devices, settings),
            settings=settings,
            pool=self.pool,
            pristine=self.pristine,
            before=self,
        )

    def model_loaded(
        self, patcher: Any, loader: str, path: str, options: dict[str, Any], file: str
    ) -> None:
        """Note which file a model of ours came from; ``file`` was its identity before."""
        self.models.remember(patcher.model, loader, path, options, file=file)

    def begin_run(self, patcher: Any = None) -> Run:
        """Begin to count a sampling run of a ModelPatcher."""
        run = Run(patcher.model if self.is_flux(patcher) else None)
        if run.is_flux:
            run.in_use.add(run.model)
            self.runs.append(run)
        return run

    def is_flux(self, patcher: Any) -> bool:
        """Whether a ModelPatcher's model is one for the workers."""
        flux = getattr(getattr(patcher, "model", None), "diffusion_model", None)
        return self.pristine.is_member(flux)

    def end_run(self, run: Run) -> None:
        """End the count of a run, and say one line about it if FLUX took part."""
        if run in self.runs:
            self.runs.remove(run)
        with self._lock:
            self._steps.end(run)
        self.books.close(run)

    def forward(
        self, flux: Any, arguments: Mapping[str, Any], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Compute one call on the workers.

        Args:
            arguments: the arguments of ``Flux._forward`` by name.
            compute: ComfyUI's own forward with them.

        Returns:
            The model's output, or None: the caller runs ComfyUI's own forward.

        Raises:
            FallBackError: ``XDIT_STRICT=1`` and the call cannot be parallel.
            TheirError: ComfyUI's own code raised.
            InterruptProcessingException: the user cancelled.
        """
        run = self.current_run.get() or Run()
        begin = time.perf_counter()
        outcome = self.attempt(flux, arguments, compute, run, is_inner=run.is_around)
        if run.is_around and isinstance(outcome, Refusal):
            return None  # The call around this call has the blocks run, and is counted.
        run.num_calls += 1
        out = None
        if isinstance(outcome, Refusal) and outcome.has_raised:
            self.hooks.make_up()
            out = theirs(compute)()  # and if this raises, that is all there is to say
        ours = self.counted(outcome, run, time.perf_counter() - begin)
        return out if ours is None else ours

    def attempt(
        self,
        flux: Any,
        arguments: Mapping[str, Any],
        compute: Callable[[], torch.Tensor],
        run: Run,
        **kinds: Any,
    ) -> Step | Refusal:
        """Compute one call on the workers, and count nothing; see ``ParallelSteps.run``."""
        with self._lock:
            return run.refusal or self._steps.run(
                flux, arguments, compute, self.base_model.get(), run, **kinds
            )

    def counted(self, outcome: Step | Refusal, run: Run, seconds: float) -> torch.Tensor | None:
        """Count what became of a call; return its result, or None: ComfyUI computes it."""
        base_model = self.base_model.get()
        if base_model is not None:
            is_here = isinstance(outcome, Refusal) or outcome.is_one
            self.memory.ran(base_model, is_parallel=not is_here)
        if isinstance(outcome, Refusal):
            self.books.refuse(outcome, run)
            return None
        self.books.count(outcome, run, seconds)
        return outcome.out

    def refuse(self, refusal: Refusal) -> None:
        """Count a call that is left to ComfyUI and was not tried; strict mode: FallBackError."""
        self.books.refuse(refusal, self.current_run.get() or Run())

    def control(
        self, net: Any, arguments: Mapping[str, Any], compute: Callable[[], Residuals]
    ) -> Residuals | None:
        """Compute one call of a ControlNet on the workers; see ``ControlNets.forward``."""
        run = self.current_run.get()
        if run is None or not run.is_flux or run.refusal or run.needs_residuals:
            return None  # Residuals will be needed here.
        with self._lock:
            return self.controls.forward(net, arguments, compute, run)

    def decode(
        self, decoder: Any, arguments: Mapping[str, Any], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Decode one latent on the workers; see ``Decoding.decode``."""
        with self._lock:
            return self._decoding.decode(decoder, arguments, compute)

    def decode_tiled(
        self, vae: Any, call: Mapping[str, Any], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Decode one latent in tiles; see ``Decoding.decode_tiled``."""
        with self._lock:
            return self._decoding.decode_tiled(vae, call, compute)

    def free(self, required: float, device: Any, *, for_dynamic: bool) -> None:
        """Have workers give memory back: all of it for Free and Unload, or what is missing."""
        crew = self.pool.crew
        if crew is None:
            return
        weights = crew.of(self._weights)
        if required >= EVERYTHING:
            if weights.may_hold_any:
                with self._lock:
                    weights.unload(crew)
            return
        run = self.current_run.get()
        if run is not None and run.is_flux:
            return  # ComfyUI makes room for the very model that the workers run.
        ranks = self.memory.is_wanted(weights, required, device, for_dynamic=for_dynamic)
        if ranks:
            with self._lock:
                weights.give_way(crew, ranks)

    def leaves_out_hooks(self, patcher: Any) -> bool:
        """Whether ComfyUI's own copy of a model can do without its hooks' patches for now."""
        run = self.current_run.get()
        if run is None or run.refusal or self.pool.crew is None:
            return False
        base_model = patcher.model
        if not self.is_flux(patcher) or getattr(base_model, "current_patcher", None) is not patcher:
            return False
        # Strict mode compares ComfyUI's weights with the workers', where they are complete.
        if self.settings.strict and not self.holds_back(patcher):
            return False
        return self.hooks.may_be_left_out and self._steps.reaches_us(base_model)

    def holds_back(self, patcher: Any) -> bool:
        """Whether ComfyUI's own copy of a model is to stay off the GPU."""
        is_up = self.pool.state in (PoolState.READY, PoolState.STARTING)
        is_ours = self.is_flux(patcher) or self.controls.holds(patcher.model)
        return is_up and is_ours and self.memory.is_held_back(patcher)

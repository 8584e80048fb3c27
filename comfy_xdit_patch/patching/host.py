"""Decide for each call of FLUX's forward: on the workers, or as ComfyUI does; and count it.

Runs in: host process. One object for the process, made when ComfyUI's modules are ready.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from comfy_xdit_patch.errors import FallBackError, Refusal, Scope, WorkerError
from comfy_xdit_patch.observability.log import summary, warn_once
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.controls import ControlNets
from comfy_xdit_patch.patching.deferred import Residuals
from comfy_xdit_patch.patching.holding import Holding, Run
from comfy_xdit_patch.patching.memory import EVERYTHING, SharedMemory
from comfy_xdit_patch.patching.models import ModelRegistry
from comfy_xdit_patch.patching.pool_status import pool_status
from comfy_xdit_patch.patching.remote import RemoteForward
from comfy_xdit_patch.patching.remote_control import RemoteControl
from comfy_xdit_patch.patching.remote_weights import RemoteWeights
from comfy_xdit_patch.patching.residency import Residency
from comfy_xdit_patch.patching.wire import Wire
from comfy_xdit_patch.planning.eligibility import (
    Pristine,
    check_arguments,
    check_grad,
    check_patcher,
)
from comfy_xdit_patch.planning.family import num_out_channels
from comfy_xdit_patch.planning.planner import plan_call
from comfy_xdit_patch.planning.workload import workload_of
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.transport.slots import UncarriedArgumentError
from comfy_xdit_patch.workers.pool import Pool, PoolState

log = logging.getLogger("comfy_xdit_patch")


class Host:
    """Everything of ours in ComfyUI's process."""

    def __init__(self, *, settings: Settings, pool: Pool, pristine: Pristine) -> None:
        self.settings = settings
        self.pool = pool
        self.totals = Totals()
        self.models = ModelRegistry()
        self.base_model: ContextVar[Any] = ContextVar("base_model", default=None)
        self.current_run: ContextVar[Run | None] = ContextVar("run", default=None)
        self._pristine = pristine
        wire = Wire(pool)
        self._remote = RemoteForward(wire, self.totals)
        self._weights = RemoteWeights(wire, self.totals, self.models, verifies=settings.strict)
        self.memory = SharedMemory(pool.devices, self._weights)
        self._holding = Holding(
            pool=pool,
            weights=self._weights,
            residency=Residency(settings, pool),
            memory=self.memory,
            totals=self.totals,
            pristine=pristine,
            models=self.models,
        )
        self.controls = ControlNets(
            RemoteControl(wire, self.totals),
            holding=self._holding,
            memory=self.memory,
            models=self.models,
            pristine=pristine,
            totals=self.totals,
        )
        self._lock = threading.RLock()

    def model_loaded(self, patcher: Any, loader: str, path: str, options: dict[str, Any]) -> None:
        """Note which file a model of ours came from."""
        self.models.remember(patcher.model, loader, path, options)

    def remember_controls(self, modules: Mapping[str, Any]) -> None:
        """Note ComfyUI's own ControlNet code before any node pack changes it."""
        self._pristine.remember_controls(modules)

    def begin_run(self, patcher: Any = None) -> Run:
        """Make the books of a sampling run of a ModelPatcher."""
        return Run(is_flux=self.is_flux(patcher))

    def is_flux(self, patcher: Any) -> bool:
        """Whether a ModelPatcher's model is one for the workers."""
        flux = getattr(getattr(patcher, "model", None), "diffusion_model", None)
        return self._pristine.is_member(flux)

    def end_run(self, run: Run) -> None:
        """Close the books of a run, and say one line about it if FLUX took part."""
        report = run.counts.report(ranks=self.pool.world_size)
        if report.steps:
            self.totals.runs += 1
            self.totals.last_run = report
            log.info("%s", summary(report, device_word=self.pool.device_word))

    def forward(self, flux: Any, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        """Compute one call on the workers.

        Args:
            arguments: the arguments of ``Flux._forward`` by name.

        Returns:
            The model's output, or None: the caller runs ComfyUI's own forward.

        Raises:
            FallBackError: ``XDIT_STRICT=1`` and the call cannot be parallel.
            InterruptProcessingException: the user cancelled.
        """
        run = self.current_run.get() or Run()
        begin = time.perf_counter()
        with self._lock:
            outcome = run.refusal or self._forward(flux, arguments, run)
        if self.base_model.get() is not None:
            self.memory.ran(self.base_model.get(), is_parallel=not isinstance(outcome, Refusal))
        if not isinstance(outcome, Refusal):
            self.totals.host_step_seconds = time.perf_counter() - begin
            run.counts.parallel_seconds.append(self.totals.host_step_seconds)
            self.totals.steps_parallel += 1
            return outcome
        if outcome.scope is Scope.RUN:
            run.refusal = outcome
        run.counts.fall_backs[outcome.reason] += 1
        self.totals.fall_backs[outcome.reason] += 1
        if self.settings.strict:
            detail = f" Last error: {self.totals.last_error}" if self.totals.last_error else ""
            raise FallBackError(
                f"XDIT_STRICT=1, and this step cannot run in parallel: {outcome.reason}.{detail}"
            )
        warn_once(outcome.reason)
        return None

    def control(
        self, net: Any, arguments: Mapping[str, Any], compute: Callable[[], Residuals]
    ) -> Residuals | None:
        """Compute one call of a ControlNet on the workers; see ``ControlNets.forward``."""
        run = self.current_run.get()
        if run is None or not run.is_flux or run.refusal or run.counts.fall_backs:
            return None  # Residuals will be needed here.
        with self._lock:
            return self.controls.forward(net, arguments, compute, run)

    def free(self, required: float, device: Any) -> None:
        """Have workers give memory back: all of it for Free and Unload, or what is missing."""
        if self.pool.state is not PoolState.READY:
            return
        if required >= EVERYTHING:
            if self._weights.holds_any:
                with self._lock:
                    self._weights.unload()
            return
        run = self.current_run.get()
        if run is not None and run.is_flux:
            return  # ComfyUI makes room for the very model that the workers run.
        ranks = self.memory.is_wanted(required, device)
        if ranks:
            with self._lock:
                self._weights.give_way(ranks)

    def holds_back(self, patcher: Any) -> bool:
        """Whether ComfyUI's own copy of a model is to stay off the GPU."""
        is_up = self.pool.state in (PoolState.READY, PoolState.STARTING)
        is_ours = self.is_flux(patcher) or self.controls.holds(patcher.model)
        return is_up and is_ours and self.memory.is_held_back(patcher)

    def _forward(self, flux: Any, arguments: Mapping[str, Any], run: Run) -> torch.Tensor | Refusal:
        import comfy.model_management

        poll = comfy.model_management.throw_exception_if_processing_interrupted
        base_model = self.base_model.get()
        # A compiled model stands in for the module it was made from.
        own = getattr(base_model, "diffusion_model", None)
        if flux not in (own, getattr(own, "_orig_mod", None)):
            return Refusal("FLUX was called outside ComfyUI's sampling", Scope.STEP)
        refusal = (
            self._pristine.check_step(flux)
            or check_patcher(base_model)
            or check_arguments(arguments)
            or check_grad(arguments["x"])
        )
        if refusal is not None:
            return refusal
        workload = workload_of(flux, arguments)
        plan = plan_call(workload, world_size=self.pool.world_size)
        if isinstance(plan, Refusal):
            return plan
        try:
            known = self._holding.hold(
                base_model,
                run,
                workload=workload,
                plan=plan,
                dtype=arguments["x"].dtype,
                poll=poll,
            )
            if isinstance(known, Refusal):
                return known
            out = self._remote.forward(
                known.number,
                arguments,
                plan=plan,
                out_channels=num_out_channels(flux, arguments["x"].shape[1]),
                poll=poll,
            )
        except WorkerError as error:
            self.totals.last_error = str(error)
            self.totals.last_loss_unix_s = time.time()
            return Refusal("a worker was lost")
        except UncarriedArgumentError as error:
            return Refusal(f"an argument cannot be carried over: {error}", Scope.STEP)
        run.counts.plan = plan.name
        return out

    def status(self) -> dict[str, Any]:
        """Everything a user or a test may want to know, as JSON."""
        return {**pool_status(self.pool, self.totals), **self.totals.to_dict()}

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

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.auto import Auto
from comfy_xdit_patch.patching.balance import PoolBalance
from comfy_xdit_patch.patching.books import Books
from comfy_xdit_patch.patching.controls import ControlNets
from comfy_xdit_patch.patching.deferred import Residuals
from comfy_xdit_patch.patching.driven import DrivenForward
from comfy_xdit_patch.patching.holding import Holding
from comfy_xdit_patch.patching.hooks import LeftOutHooks
from comfy_xdit_patch.patching.likeness import Likeness
from comfy_xdit_patch.patching.measuring import Measuring
from comfy_xdit_patch.patching.memory import EVERYTHING, SharedMemory
from comfy_xdit_patch.patching.models import ModelRegistry
from comfy_xdit_patch.patching.pipelined import Pipelines
from comfy_xdit_patch.patching.pool_status import pool_status
from comfy_xdit_patch.patching.remote import RemoteForward
from comfy_xdit_patch.patching.remote_control import RemoteControl
from comfy_xdit_patch.patching.remote_weights import RemoteWeights
from comfy_xdit_patch.patching.residency import Residency
from comfy_xdit_patch.patching.run import Run
from comfy_xdit_patch.patching.steps import ParallelSteps
from comfy_xdit_patch.patching.wire import Wire
from comfy_xdit_patch.planning.eligibility import (
    Pristine,
    check_forward,
)
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.workers.pool import Pool
from comfy_xdit_patch.workers.pool_state import PoolState

log = logging.getLogger("comfy_xdit_patch")


class Host:
    """Everything of ours in ComfyUI's process."""

    def __init__(
        self, *, settings: Settings, pool: Pool, pristine: Pristine, before: Host | None = None
    ) -> None:
        """Make it; ``before`` is the one whose place it takes, with what that knows of models."""
        self.settings = settings
        self.pool = pool
        self.totals = Totals()
        self.models: ModelRegistry = before.models if before else ModelRegistry()
        self.hooks: LeftOutHooks = before.hooks if before else LeftOutHooks()
        self.base_model: ContextVar[Any] = ContextVar("base_model", default=None)
        self.current_run: ContextVar[Run | None] = ContextVar("run", default=None)
        self._pristine = pristine
        wire = Wire(pool)
        self._remote = RemoteForward(wire, self.totals)
        self._weights = RemoteWeights(wire, self.totals, self.models, verifies=settings.strict)
        self.memory = SharedMemory(pool.devices, self._weights)
        self.holding = Holding(
            pool=pool,
            weights=self._weights,
            residency=Residency(settings, pool),
            memory=self.memory,
            totals=self.totals,
            pristine=pristine,
            models=self.models,
            strategy=settings.strategy,
            balance=PoolBalance(settings.balance, pool, self.totals),
            waits=settings.strict or not settings.starts_early,
        )
        self.measuring = Measuring(pool, budget_bytes=settings.gpu_memory_bytes)
        auto = Auto(settings, pool, self.measuring)
        self._books = Books(self.totals, pool=pool, auto=auto, is_strict=settings.strict)
        self.pipelines = Pipelines(wire)
        self.likeness = Likeness(wire, self._weights.follow_generation)
        self._steps = ParallelSteps(
            self._remote,
            DrivenForward(wire, self.totals),
            holding=self.holding,
            pristine=pristine,
            totals=self.totals,
            hooks=self.hooks,
            auto=auto,
            pipelines=self.pipelines,
            likeness=self.likeness,
        )
        self.controls = ControlNets(
            RemoteControl(wire, self.totals),
            holding=self.holding,
            memory=self.memory,
            models=self.models,
            pristine=pristine,
            totals=self.totals,
            likeness=self.likeness,
        )
        self._lock = threading.RLock()

    def successor(self, settings: Settings) -> Host:
        """Return one for other settings, whose workers are new and hold nothing."""
        return Host(settings=settings, pool=self.pool, pristine=self._pristine, before=self)

    def model_loaded(self, patcher: Any, loader: str, path: str, options: dict[str, Any]) -> None:
        """Note which file a model of ours came from."""
        self.models.remember(patcher.model, loader, path, options)

    def remember_controls(self, modules: Mapping[str, Any]) -> None:
        """Note ComfyUI's own ControlNet code before any node pack changes it."""
        self._pristine.remember_controls(modules)

    def begin_run(self, patcher: Any = None) -> Run:
        """Make the books of a sampling run of a ModelPatcher."""
        run = Run(is_flux=self.is_flux(patcher))
        if run.is_flux:
            run.in_use.add(patcher.model)
        return run

    def is_flux(self, patcher: Any) -> bool:
        """Whether a ModelPatcher's model is one for the workers."""
        flux = getattr(getattr(patcher, "model", None), "diffusion_model", None)
        return self._pristine.is_member(flux)

    def end_run(self, run: Run) -> None:
        """Close the books of a run, and say one line about it if FLUX took part."""
        self._remote.gone_objects += [number for _, number in run.objects.values()]
        with self._lock:
            self._steps.end(run)
        self._books.close(run)

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
            InterruptProcessingException: the user cancelled.
        """
        run = self.current_run.get() or Run()
        run.num_calls += 1
        begin = time.perf_counter()
        base_model = self.base_model.get()
        with self._lock:
            outcome = run.refusal or self._steps.run(flux, arguments, compute, base_model, run)
        if base_model is not None:
            is_here = isinstance(outcome, Refusal) or outcome.is_one
            self.memory.ran(base_model, is_parallel=not is_here)
        if not isinstance(outcome, Refusal):
            self._books.count(outcome, run, time.perf_counter() - begin)
            return outcome.out
        self._books.refuse(outcome, run)
        return None

    def faulted(self) -> None:
        """Count a step that a fault of ours left to ComfyUI."""
        run = self.current_run.get() or Run()
        self._books.refuse(
            Refusal("a fault of comfy-xdit-patch, which is in the log", Scope.STEP), run
        )

    def applied(self, base_model: Any, num_calls: int) -> None:
        """Say why a call of a BaseModel never came to us, if a node is the reason.

        Args:
            num_calls: that had come in this run before.
        """
        run = self.current_run.get()
        if run is None or run.num_calls != num_calls:
            return
        flux = getattr(base_model, "diffusion_model", None)
        if self._pristine.is_member(flux):
            for refusal in check_forward(flux):
                self._books.refuse(refusal, run)

    def control(
        self, net: Any, arguments: Mapping[str, Any], compute: Callable[[], Residuals]
    ) -> Residuals | None:
        """Compute one call of a ControlNet on the workers; see ``ControlNets.forward``."""
        run = self.current_run.get()
        if run is None or not run.is_flux or run.refusal or run.needs_residuals:
            return None  # Residuals will be needed here.
        with self._lock:
            return self.controls.forward(net, arguments, compute, run)

    def free(self, required: float, device: Any, *, for_dynamic: bool) -> None:
        """Have workers give memory back: all of it for Free and Unload, or what is missing."""
        if self.pool.state is not PoolState.READY:
            return
        if required >= EVERYTHING:
            if self._weights.may_hold_any:
                with self._lock:
                    self._weights.unload()
            return
        run = self.current_run.get()
        if run is not None and run.is_flux:
            return  # ComfyUI makes room for the very model that the workers run.
        ranks = self.memory.is_wanted(required, device, for_dynamic=for_dynamic)
        if ranks:
            with self._lock:
                self.memory.give_way(ranks)

    def leaves_out_hooks(self, patcher: Any) -> bool:
        """Whether ComfyUI's own copy of a model can do without its hooks' patches for now."""
        run = self.current_run.get()
        if run is None or run.refusal or self.pool.state is not PoolState.READY:
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

    def status(self) -> dict[str, Any]:
        """Everything a user or a test may want to know, as JSON."""
        counts = self.totals.to_dict()
        return {**pool_status(self.pool, self.totals), **counts, "machine": self.measuring.status()}

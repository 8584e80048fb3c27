"""One rank: hold a model's weights and compute this rank's share of calls.

Runs in: worker process.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from typing import Any

import torch

from comfy_xdit_patch.engine.flux import forward_share
from comfy_xdit_patch.engine.groups import Groups
from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.transport.fingerprint import fingerprint
from comfy_xdit_patch.transport.messages import (
    Done,
    Forward,
    Load,
    Loaded,
    ModelSource,
    NotLoaded,
)
from comfy_xdit_patch.transport.slots import SlotMap

log = logging.getLogger(__name__)


class Engine:
    """Weights and forwards of one rank."""

    def __init__(self, *, groups: Groups, slots: SlotMap) -> None:
        self._groups = groups
        self._slots = slots
        self._model: int | None = None
        self._patcher: Any = None
        self._fingerprint = ""
        self._num_forwards = 0

    def load(self, message: Load) -> Loaded | NotLoaded:
        """Load a model with ComfyUI's own loader, in place of the one before."""
        start = time.perf_counter()
        try:
            self._load(message)
        except Exception as error:
            # Loading is no collective: this rank fails alone and can go on.
            log.exception("could not load %s", message.source.path)
            self.unload()
            return NotLoaded(message.request, f"{type(error).__name__}: {error}")
        return Loaded(message.request, self._fingerprint, time.perf_counter() - start)

    def _load(self, message: Load) -> None:
        if self._model != message.model:
            self.unload()
            self._patcher = load_patcher(message.source)
            model = self._patcher.model
            self._fingerprint = fingerprint(
                model.diffusion_model, manual_cast_dtype=model.manual_cast_dtype
            )
            self._model = message.model
            import comfy.model_management

            comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)

    def unload(self) -> None:
        """Drop all weights and give the memory back to the device."""
        if self._patcher is None:
            return
        import comfy.model_management

        self._patcher = None
        self._model = None
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()

    def forward(self, message: Forward) -> Done:
        """Compute this rank's share of a call and write its rows to the result slot.

        Collective: every rank gets the same message.
        """
        if self._model != message.model:
            raise WorkerError(f"Model {message.model} is asked for, {self._model} is loaded.")
        start = time.perf_counter()
        plan = ParallelPlan(self._groups.world_size, message.batch_degree, message.ulysses_degree)
        arguments = self._slots.fetch(message.arguments)
        rank = self._groups.rank
        with torch.inference_mode():
            rows, bytes_sent = forward_share(
                self._patcher.model.diffusion_model, arguments, plan=plan, groups=self._groups
            )
            batch = arguments["x"].shape[0]
            shape = (batch, *rows.shape[1:])
            bytes_written = 0
            if plan.sequence_index(rank) == 0:
                first, end = plan.batch_rows(rank, batch)
                self._slots[message.result].view(rows.dtype, shape)[first:end].copy_(rows)
                bytes_written = rows.nbytes
        self._num_forwards += 1
        return Done(
            request=message.request,
            num_forwards=self._num_forwards,
            dtype=str(rows.dtype).removeprefix("torch."),
            shape=shape,
            seconds=time.perf_counter() - start,
            bytes_between_ranks=bytes_sent,
            bytes_written=bytes_written,
        )


def load_patcher(source: ModelSource) -> Any:
    """Load the diffusion model of a file, and only that: no text encoder, no VAE.

    Raises:
        WorkerError: the file is not the one that the host read.
    """
    import comfy.sd

    stat = os.stat(source.path)
    if (stat.st_size, stat.st_mtime_ns) != (source.size_bytes, source.mtime_ns):
        raise WorkerError(f"{source.path} was changed after ComfyUI read it.")
    options = {
        name: getattr(torch, value.removeprefix("torch.")) if name == "dtype" else value
        for name, value in source.options.items()
    }
    if source.loader == "load_diffusion_model":
        return comfy.sd.load_diffusion_model(source.path, model_options=options)
    return comfy.sd.load_checkpoint_guess_config(
        source.path,
        output_vae=False,
        output_clip=False,
        output_clipvision=False,
        model_options=options,
    )[0]

"""One GPU's memory has one owner at a time: ComfyUI, or the worker on the same GPU.

Runs in: host process.

    ComfyUI wants room (text encoder, VAE)      the worker on that GPU gives its weights back
    a worker wants to load, or to compute       ComfyUI moves its own models off that GPU first
    ComfyUI would load FLUX beside the worker   held back: its copy stays in RAM (before 0.33; later
                                                versions bring weights to the GPU on first use only)
    Free, Unload, --disable-smart-memory        every worker drops everything

For each change of hooks ComfyUI writes a model's weights anew (comfy/model_patcher.py,
``patch_hooks``), twice in a step where two prompts have different ones. Nobody reads them while the
workers compute; and where a worker has this GPU they lie in CPU memory, where that takes seconds.
So it is left out, and made up for before ComfyUI's own forward runs: ``patch_hooks`` goes by what
it has put aside and not by ``current_hooks``, so it may be left out any number of times.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from comfy_xdit_patch.hardware.devices import Device, visible_gpus
from comfy_xdit_patch.host.weights.held import RemoteWeights
from comfy_xdit_patch.wire.fingerprint import is_dynamic
from comfy_xdit_patch.wire.own_attribute import own_attribute

EVERYTHING = 1e29
"""``unload_all_models`` asks for 1e30 bytes."""
NEXT_TO_NOTHING = 0.1
"""What ComfyUI's own --novram gives a model (comfy/model_management.py, load_models_gpu)."""


class SharedMemory:
    """Decides whose turn it is on a device that ComfyUI and a worker share."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._alone: weakref.WeakSet[Any] = weakref.WeakSet()
        self._computing_bytes: ContextVar[float | None] = ContextVar("computing", default=None)

    def ranks_on(self, device: Any) -> list[int]:
        """Ranks whose device is this one of ComfyUI's; every rank, for CPU ranks."""
        if device.type == "cpu":
            return [rank for rank, d in enumerate(self._devices) if d.is_cpu]
        if device.type != "cuda":
            return []
        uuid = visible_gpus()[device.index or 0].uuid
        return [rank for rank, d in enumerate(self._devices) if d.uuid == uuid]

    @contextmanager
    def loading(self, computing_bytes: float | None) -> Iterator[None]:
        """Note what ComfyUI wants to compute with, beside the weights of the models it loads."""
        token = self._computing_bytes.set(computing_bytes)
        try:
            yield
        finally:
            self._computing_bytes.reset(token)

    def is_wanted(
        self, weights: RemoteWeights, required: float, device: Any, *, for_dynamic: bool
    ) -> list[int]:
        """Ranks that must give way so that ComfyUI has this many bytes free on its device.

        Args:
            for_dynamic: all of it is for models whose weights come to the GPU at their use, and for
                what is computed. Those weights do with the room that there is: to pass a text
                encoder's through it once is quicker than to have a worker read its own again.
        """
        import comfy.model_management as management

        if not weights.may_hold_any or device is None:
            return []
        computing = self._computing_bytes.get()
        if for_dynamic and computing is not None:
            reserved = management.extra_reserved_memory()
            required = min(
                required, max(management.minimum_inference_memory(), computing + reserved)
            )
        ranks = [rank for rank in self.ranks_on(device) if rank not in weights.away]
        if not ranks or management.get_free_memory(device) >= required:
            return []
        return ranks

    def make_room_for_workers(
        self,
        weights: RemoteWeights,
        base_model: Any,
        needed_bytes: int | None,
        in_use: Container[Any] = (),
        *,
        held: int | None = None,
    ) -> None:
        """Have ComfyUI's other models leave a GPU on which a worker is about to run this one.

        ComfyUI takes those first that have most in CPU memory: without ``keep_loaded`` the very
        model that is being sampled, whose object patches would be taken back.

        Args:
            needed_bytes: what the worker takes; None if the whole model and a call of it.
            in_use: ``BaseModel`` of the run, which stay as well.
            held: the model's number if its weights lie on the worker's card already, unless it
                gave way since.
        """
        import comfy.model_management as management

        weights.away.clear()
        patcher = base_model.current_patcher
        if not self.shares_gpu(patcher.load_device):
            return
        if needed_bytes is None:
            needed_bytes = patcher.model_size() + management.minimum_inference_memory()
        if held is not None:
            if held in weights.displaced:
                weights.displaced.discard(held)
            else:
                needed_bytes = max(0, needed_bytes - weights.bytes_of({held}))
        kept = [
            loaded
            for loaded in management.current_loaded_models
            if loaded.model is not None
            and (loaded.model.is_clone(patcher) or loaded.model.model in in_use)
        ]
        management.free_memory(needed_bytes, patcher.load_device, keep_loaded=kept)

    def empty_cache(self) -> None:
        """Have ComfyUI's process give back what its allocator keeps of tensors that are gone."""
        import comfy.model_management

        comfy.model_management.soft_empty_cache()

    def ran(self, base_model: Any, *, is_parallel: bool) -> None:
        """Note whether a model's last step was parallel: if not, ComfyUI needs its own copy."""
        if is_parallel:
            self._alone.discard(base_model)
        else:
            self._alone.add(base_model)

    def is_held_back(self, patcher: Any) -> bool:
        """Whether ComfyUI's own copy of a model stays off the GPU, because a worker has one."""
        if patcher.model in self._alone or not self.shares_gpu(patcher.load_device):
            return False
        if is_dynamic(patcher):
            return False
        # A control LoRA reshapes img_in, and ComfyUI reads that shape before the forward.
        return not any(key.startswith("diffusion_model.img_in.") for key in patcher.patches)

    def fits_beside_worker(self, patcher: Any) -> bool:
        """Whether ComfyUI's own copy fits on its GPU whole, where a worker has one already."""
        import comfy.model_management as management

        if not self.shares_gpu(patcher.load_device):
            return True
        missing = patcher.model_size() - patcher.loaded_size()
        room = management.get_free_memory(patcher.load_device)
        return bool(room >= missing + management.minimum_inference_memory())

    def shares_gpu(self, device: Any) -> bool:
        """Whether a worker's device is this one of ComfyUI's, and a GPU."""
        return device.type == "cuda" and bool(self.ranks_on(device))


@contextmanager
def nothing_pinned() -> Iterator[None]:
    """Have ComfyUI pin no weights while this lasts: a copy that is held back is read by nobody."""
    import comfy.model_management

    with own_attribute(comfy.model_management, "MAX_PINNED_MEMORY", 0):
        yield


class LeftOutHooks:
    """ModelPatchers whose weights are not yet what their ``current_hooks`` ask for."""

    def __init__(self) -> None:
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._makes_up = False

    @property
    def may_be_left_out(self) -> bool:
        """Whether this is not the very call that makes up for others."""
        return not self._makes_up

    def leave_out(self, patcher: Any, hooks: Any) -> None:
        """Note hooks instead of applying them."""
        patcher.current_hooks = hooks
        self._waiting.add(patcher)

    def forget(self, patcher: Any) -> None:
        """ComfyUI applies other hooks to these weights."""
        self._waiting.discard(patcher)

    def make_up(self) -> None:
        """Have ComfyUI apply what was left out: its own copies of models are about to be read."""
        while self._waiting:
            patcher = self._waiting.pop()
            self._makes_up = True
            try:
                patcher.patch_hooks(patcher.current_hooks)
            finally:
                self._makes_up = False

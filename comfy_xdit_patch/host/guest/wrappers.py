"""The wrappers of all patch points.

Runs in: host process.

Each one begins with the way out, keeps our faults inside ``our_faults_stay_ours``, and calls the
original once, outside of it, with the original arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from comfy_xdit_patch.host.boundary import Attempt, attempt, our_faults_stay_ours
from comfy_xdit_patch.host.guest.between import Between
from comfy_xdit_patch.host.guest.host import Host
from comfy_xdit_patch.host.guest.outer_calls import FAULT, met, watched
from comfy_xdit_patch.host.weights.one_owner import NEXT_TO_NOTHING, nothing_pinned
from comfy_xdit_patch.report import log
from comfy_xdit_patch.wire.files import file_identity

Call = Callable[..., Any]


class Wrappers:
    """One method for each patch point, all on one host."""

    def __init__(self, host: Host, between: Between) -> None:
        self.serve(host)
        self._between = between
        self._signatures: dict[Any, inspect.Signature] = {}
        self._attempt_step: Call = self._attempt

    def serve(self, host: Host) -> None:
        """Have all calls go to this host from now on."""
        self._host = host
        self._strict = host.settings.strict

    def flux_forward(self, wrapped: Call, flux: Any, args: Any, kwargs: Any) -> Any:
        """Compute ``Flux._forward`` on the workers if this call can be parallel."""
        token = self._host.is_inside.set(True)
        try:
            ours = self._attempt_step(wrapped, flux, args, kwargs)
            if ours.out is not None:
                return ours.out
            self._host.hooks.make_up()  # Outside: without it ComfyUI would compute other weights.
            out = wrapped(*args, **kwargs)
            if ours.fault is not None:
                self._step_faulted(ours.fault)
            return out
        finally:
            self._host.is_inside.reset(token)

    def _attempt(self, wrapped: Call, flux: Any, args: Any, kwargs: Any) -> Attempt:
        return attempt(
            lambda: self._host.forward(
                flux, self._bind(wrapped, args, kwargs), lambda: wrapped(*args, **kwargs)
            )
        )

    def _step_faulted(self, fault: Exception) -> None:
        with our_faults_stay_ours("a step", strict=self._strict):
            raise fault
        with our_faults_stay_ours("counting a fault"):
            self._host.refuse(FAULT)

    def control_forward(self, wrapped: Call, net: Any, args: Any, kwargs: Any) -> Any:
        """Compute ``ControlNetFlux.forward`` on the workers if they run the model too."""
        ours = attempt(
            lambda: self._host.control(
                net, self._bind(wrapped, args, kwargs), lambda: wrapped(*args, **kwargs)
            )
        )
        if ours.out is not None:
            return ours.out
        out = wrapped(*args, **kwargs)
        if ours.fault is not None:
            with our_faults_stay_ours("a ControlNet"):
                raise ours.fault
        return out

    def decode(self, wrapped: Call, decoder: Any, args: Any, kwargs: Any) -> Any:
        """Compute a VAE's ``Decoder.forward`` on the workers if it is worth it."""
        return self._decode(self._host.decode, wrapped, decoder, args, kwargs)

    def decode_tiled(self, wrapped: Call, vae: Any, args: Any, kwargs: Any) -> Any:
        """Have the workers decode tiles while ``VAE.decode_tiled_`` blends them."""
        return self._decode(self._host.decode_tiled, wrapped, vae, args, kwargs)

    def tiled_scale(self, wrapped: Call, _: Any, args: Any, kwargs: Any) -> Any:
        """Note which tiles of a picture there will be, where ``decode_tiled`` looks ahead."""
        tiles = self._host.tiles.get()
        if tiles is None or not tiles.is_noting:
            return wrapped(*args, **kwargs)
        return tiles.note(wrapped, self._bind(wrapped, args, kwargs))

    def _decode(self, ours: Call, wrapped: Call, module: Any, args: Any, kwargs: Any) -> Any:
        if not self._host.settings.decodes:
            return wrapped(*args, **kwargs)
        with self._between.busy():  # One may be outside of any prompt.
            made = attempt(
                lambda: ours(
                    module, self._bind(wrapped, args, kwargs), lambda: wrapped(*args, **kwargs)
                )
            )
            if made.out is not None:
                return made.out
            out = wrapped(*args, **kwargs)
            if made.fault is not None:
                with our_faults_stay_ours("decoding a picture"):
                    raise made.fault
            return out

    def load_controlnet(self, wrapped: Call, _: Any, args: Any, kwargs: Any) -> Any:
        """Note which file a ControlNet came from."""
        file = self._file_of(wrapped, args, kwargs, "ckpt_path")
        control = wrapped(*args, **kwargs)
        with our_faults_stay_ours("noting a ControlNet's file"):
            call = self._bind(wrapped, args, kwargs)
            path, options = call["ckpt_path"], call["model_options"]
            self._host.controls.loaded(control, path, options, file=file)
        return control

    def apply_model(self, wrapped: Call, base_model: Any, args: Any, kwargs: Any) -> Any:
        """Tell the call below which BaseModel, and so which ModelPatcher, it belongs to."""
        token = self._host.base_model.set(base_model)
        try:
            with met(self._host, base_model):
                return wrapped(*args, **kwargs)
        finally:
            self._host.base_model.reset(token)

    def outer_sample(self, wrapped: Call, guider: Any, args: Any, kwargs: Any) -> Any:
        """Mark one sampling run."""
        with self._between.busy():  # One may be outside of any prompt.
            return self._sample(wrapped, guider, args, kwargs)

    def _sample(self, wrapped: Call, guider: Any, args: Any, kwargs: Any) -> Any:
        run = None
        with our_faults_stay_ours("the start of a run"):
            run = self._host.begin_run(getattr(guider, "model_patcher", None))
        token = self._host.current_run.set(run)
        num_sigmas = 0
        with our_faults_stay_ours("the steps of a run"):
            sigmas: Any = self._bind(wrapped, args, kwargs).get("sigmas")
            num_sigmas = len(sigmas) if hasattr(sigmas, "__len__") else 0
        try:
            with watched(self._host, guider, run, num_sigmas):
                return wrapped(*args, **kwargs)
        finally:
            self._host.current_run.reset(token)
            if run is not None:
                with our_faults_stay_ours("the end of a run"):
                    self._host.end_run(run)

    def execute_prompt(self, wrapped: Call, _: Any, args: Any, kwargs: Any) -> Any:
        """Mark one prompt."""
        with self._between.busy():
            return self._execute(wrapped, args, kwargs)

    def _execute(self, wrapped: Call, args: Any, kwargs: Any) -> Any:
        with our_faults_stay_ours("the start of a prompt"):
            log.begin_prompt()
            self._host.books.begin_prompt()
        try:
            return wrapped(*args, **kwargs)
        finally:
            with our_faults_stay_ours("the end of a prompt"):
                self._host.books.end_prompt()

    def load_diffusion_model(self, wrapped: Call, _: Any, args: Any, kwargs: Any) -> Any:
        """Note which file a diffusion model came from."""
        file = self._file_of(wrapped, args, kwargs, "unet_path")
        patcher = wrapped(*args, **kwargs)
        with our_faults_stay_ours("noting a model's file"):
            call = self._bind(wrapped, args, kwargs)
            path, options = call["unet_path"], call["model_options"]
            self._note(patcher, "load_diffusion_model", path, options, file)
        return patcher

    def load_checkpoint(self, wrapped: Call, _: Any, args: Any, kwargs: Any) -> Any:
        """Note which file a checkpoint's diffusion model came from."""
        file = self._file_of(wrapped, args, kwargs, "ckpt_path")
        loaded = wrapped(*args, **kwargs)
        with our_faults_stay_ours("noting a model's file"):
            if loaded[0] is not None:
                call = self._bind(wrapped, args, kwargs)
                path, options = call["ckpt_path"], call["model_options"]
                self._note(loaded[0], "load_checkpoint_guess_config", path, options, file)
        return loaded

    def free_memory(self, wrapped: Call, _: Any, args: Any, kwargs: Any) -> Any:
        """Have workers give their memory back when ComfyUI needs it."""
        out = wrapped(*args, **kwargs)
        # ComfyUI frees between prompts too, when others may end the workers.
        with our_faults_stay_ours("freeing memory"), self._between.busy():
            call = self._bind(wrapped, args, kwargs)
            # Versions without dynamic VRAM have no such argument.
            is_dynamic = bool(call.get("for_dynamic"))
            self._host.free(call["memory_required"], call["device"], for_dynamic=is_dynamic)
        return out

    def load_models(self, wrapped: Call, _: Any, args: Any, kwargs: Any) -> Any:
        """Tell ``free_memory`` below what the models that are loaded are to compute with."""
        computing: float | None = None
        with our_faults_stay_ours("loading models"):
            computing = float(self._bind(wrapped, args, kwargs)["memory_required"])
        with self._host.memory.loading(computing):
            return wrapped(*args, **kwargs)

    def partially_load(self, wrapped: Call, patcher: Any, args: Any, kwargs: Any) -> Any:
        """Keep ComfyUI's own copy of a model off a GPU where a worker has one."""
        pinning: AbstractContextManager[None] = nullcontext()
        with our_faults_stay_ours("holding a model back"):
            if self._host.is_flux(patcher):
                self._get_ready()  # A node pack's own loader is not seen earlier.
            if self._host.holds_back(patcher):
                kwargs = {**self._bind(wrapped, args, kwargs), "extra_memory": NEXT_TO_NOTHING}
                args = ()
                pinning = nothing_pinned()
        with pinning:
            return wrapped(*args, **kwargs)

    def patch_hooks(self, wrapped: Call, patcher: Any, args: Any, kwargs: Any) -> Any:
        """Leave ComfyUI's own copy of a model as it is while the workers run it."""
        with our_faults_stay_ours("the hooks of a model"):
            hooks = self._bind(wrapped, args, kwargs)["hooks"]
            if hooks is not None and self._host.leaves_out_hooks(patcher):
                self._host.hooks.leave_out(patcher, hooks)
                return None
            self._host.hooks.forget(patcher)
        return wrapped(*args, **kwargs)

    def _file_of(self, wrapped: Call, args: Any, kwargs: Any, name: str) -> str:
        """Name the file that a loader is about to read; empty for none."""
        with our_faults_stay_ours("noting a file before it is read"):
            return file_identity(self._bind(wrapped, args, kwargs)[name])
        return ""

    def _note(
        self, patcher: Any, loader: str, path: str, options: dict[str, Any], file: str
    ) -> None:
        if self._host.is_flux(patcher):
            self._host.model_loaded(patcher, loader, path, options, file)
            self._get_ready()

    def _get_ready(self) -> None:
        """Start the workers while ComfyUI is busy with the rest of the graph."""
        self._host.pool.start()
        if self._attempt_step == self._attempt:
            # Called from a compiled model, Dynamo would compile our own functions one by one.
            # Here and not earlier: Dynamo takes 1.2 s to import, which only FLUX should cost.
            import torch

            self._attempt_step = torch.compiler.disable(self._attempt)  # type: ignore[no-untyped-call]

    def _bind(self, wrapped: Call, args: Any, kwargs: Any) -> dict[str, Any]:
        """Name all arguments: their order differs between ComfyUI versions."""
        # Under a plain function of another extension's, wrapt hands us a proxy that holds the
        # object it is bound to: as a key it would keep a model for as long as the process lives.
        function = getattr(wrapped, "__func__", None) or getattr(wrapped, "__wrapped__", wrapped)
        signature = self._signatures.get(function)
        if signature is None:
            signature = self._signatures[function] = inspect.signature(wrapped)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        named = dict(call.arguments)
        more = named.pop("kwargs", {})
        return {**named, **more}

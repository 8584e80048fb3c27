"""What lies over a model's patched weights: patches of hooks, and bypass LoRAs.

Runs in: worker process.

    stored --ModelPatcher.patches--> patched --ModelPatcher.patch_hooks--> weights in use

Hooks differ between the conditions of one step, so their patches come and go with each call.
ComfyUI's own ``ModelPatcher`` lays them on the weights in use, takes them off, and remembers the
weights of several groups (comfy/model_patcher.py, ``patch_hooks``); a bypass LoRA is ComfyUI's own
``BypassForwardHook`` on the layer, as it is in the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.tensors import take_apart
from comfy_xdit_patch.wire.weight_patches import decode, is_quantised
from comfy_xdit_patch.worker.weights.placing import Progress, calls_counted

KEPT_GROUPS = 3
"""Groups of hooks whose weights are kept, where there is room for them."""

Tensor = Callable[[Tree], torch.Tensor]


class Overlay:
    """The hooks of one model on one rank."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._groups: dict[str, Any] = {}
        self._bypass: list[Any] = []
        self._bypass_key: str | None = None

    @property
    def has_bypass(self) -> bool:
        """Whether bypass LoRAs lie around layers."""
        return bool(self._bypass)

    def apply(
        self,
        patcher: Any,
        state: Mapping[str, Tree],
        *,
        stored: Mapping[str, torch.Tensor],
        tensor: Tensor,
        progress: Progress,
    ) -> None:
        """Lay over a model what a state asks for, and nothing else.

        Args:
            patcher: ComfyUI's, with its patches applied.
            stored: the weights as they are stored, by key; never written to.
            tensor: finds the tensor behind a place.

        Raises:
            WorkerError: the overlay does not fit in memory.
        """
        bypass = state.get("bypass")
        if (bypass and bypass["key"]) != self._bypass_key:
            self._eject()
            self._inject(patcher.model.diffusion_model, bypass, tensor)
        hooks = state.get("hooks")
        if hooks is None:
            if patcher.current_hooks is not None:
                patcher.patch_hooks(None)
            return
        group = self._groups.pop(hooks["key"], None) or self._register(
            patcher, decode(hooks["tree"], tensor), stored
        )
        self._groups[hooks["key"]] = group  # Last in the dictionary: used last.
        if patcher.current_hooks is not group:
            _patch(patcher, group, progress)
        while len(self._groups) > KEPT_GROUPS:
            self._forget(patcher, next(iter(self._groups)))

    def take_off(self, patcher: Any, *, restore: bool) -> None:
        """Take this overlay off the model.

        Args:
            restore: give the weights their contents back. Without it the caller replaces them.
        """
        self._eject()
        if restore:
            patcher.patch_hooks(None)
        patcher.hook_backup.clear()
        patcher.current_hooks = None
        for key in list(self._groups):
            self._forget(patcher, key)

    def bytes_held(self, patcher: Any) -> int:
        """Bytes on the device that the weights put aside take."""
        kept = [patcher.hook_backup, *patcher.cached_hook_patches.values()]
        return sum(
            part.nbytes
            for weights in kept
            for weight, _ in weights.values()
            if weight.device == patcher.load_device
            for part in take_apart(weight)[0].values()
        )

    def _register(
        self, patcher: Any, patches: Mapping[str, Any], stored: Mapping[str, torch.Tensor]
    ) -> Any:
        """Make ComfyUI's hook of these patches, and see where its weights can be kept."""
        import comfy.hooks
        import comfy.utils

        if patcher.model.model_lowvram:
            raise WorkerError("Hook-scheduled weight patches need the whole model on the device.")
        weights = {key: comfy.utils.get_attr(patcher.model, key) for key in patches}
        size = sum(part.nbytes for w in weights.values() for part in take_apart(w)[0].values())
        has_room = self._has_room(patcher, size)
        # ComfyUI puts what it remembers of a quantised weight back as if it were not quantised.
        remembers = has_room and not any(is_quantised(patcher.model, key) for key in patches)
        mode = comfy.hooks.EnumHookMode
        patcher.hook_mode = mode.MaxSpeed if remembers else mode.MinVram
        if patcher.load_device.type == "cpu":
            for key, weight in weights.items():
                # A hook's patch is written into the weight, and this one may be the mapped file.
                if _is_same_memory(weight, stored.get(key)):
                    comfy.utils.set_attr_param(patcher.model, key, weight.clone())
        hook = comfy.hooks.WeightHook()
        group = comfy.hooks.HookGroup()
        group.add(hook)
        patcher.hook_patches[hook.hook_ref] = patches
        return group

    def _has_room(self, patcher: Any, size: int) -> bool:
        """Whether weights of this size can be kept twice: put aside, and remembered.

        ComfyUI uses the device's memory first, and then this machine's.

        Raises:
            WorkerError: they can be put aside nowhere.
        """
        import comfy.model_management as management

        # Every rank takes its own part of this machine's memory, and leaves half of that.
        ram = management.get_free_memory(torch.device("cpu")) // self._num_ranks
        is_cpu = patcher.load_device.type == "cpu"
        free = 0 if is_cpu else management.get_free_memory(patcher.load_device)
        if free - 2 * management.minimum_inference_memory() > 2 * size or ram // 2 > 2 * size:
            return True
        if not patcher.hook_backup and size > ram // 2:
            raise WorkerError(
                f"Weights that hooks patch take {size / 1e9:.1f} GB beside the model; "
                f"{ram / 1e9:.1f} GB are free for each rank."
            )
        return False

    def _forget(self, patcher: Any, key: str) -> None:
        group = self._groups.pop(key)
        patcher.cached_hook_patches.pop(group, None)
        for hook in group.hooks:
            patcher.hook_patches.pop(hook.hook_ref, None)

    def _inject(self, flux: Any, bypass: Tree, tensor: Tensor) -> None:
        if bypass is None:
            return
        from comfy.weight_adapter.bypass import BypassForwardHook

        for name, adapters in decode(bypass["tree"], tensor).items():
            for multiplier, adapter in adapters:
                hook = BypassForwardHook(flux.get_submodule(name), adapter, multiplier=multiplier)
                hook.inject()
                self._bypass.append(hook)
        self._bypass_key = bypass["key"]

    def _eject(self) -> None:
        # The last one on a layer holds the forward of the one before it.
        while self._bypass:
            self._bypass.pop().eject()
        self._bypass_key = None


def _is_same_memory(weight: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None:
        return False
    parts, others = take_apart(weight)[0], take_apart(other)[0]
    return any(
        part.data_ptr() == others[name].data_ptr() for name, part in parts.items() if name in others
    )


def _patch(patcher: Any, group: Any, progress: Progress) -> None:
    total = sum(len(patcher.hook_patches[hook.hook_ref]) for hook in group.hooks)
    # ComfyUI calls it for every weight that it has to compute.
    with calls_counted(patcher, "patch_hook_weight_to_device", total, progress):
        patcher.patch_hooks(group)

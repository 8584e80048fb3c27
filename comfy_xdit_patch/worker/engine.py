"""One rank: hold a model's weights and compute this rank's share of calls.

Runs in: worker process.
"""

from __future__ import annotations

import logging
import time

import torch

from comfy_xdit_patch.wire.fingerprint import Look
from comfy_xdit_patch.wire.messages.replies import Loaded, NotLoaded, Unloaded
from comfy_xdit_patch.wire.messages.requests import Forget, Free, Load
from comfy_xdit_patch.wire.slots import SlotMap
from comfy_xdit_patch.worker.calls import Answer, Call, Calls
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.weights.placing import Progress
from comfy_xdit_patch.worker.weights.resident import Resident
from comfy_xdit_patch.worker.weights.residents import Residents

log = logging.getLogger(__name__)


class Engine:
    """Weights and forwards of one rank."""

    def __init__(self, *, groups: Groups, slots: SlotMap) -> None:
        self._groups = groups
        self._residents = Residents(slots, groups)
        self._calls = Calls(groups=groups, slots=slots, residents=self._residents)

    def load(self, message: Load, progress: Progress) -> Loaded | NotLoaded:
        """Hold a model in one state of its weights."""
        start = time.perf_counter()
        try:
            with torch.inference_mode():  # as ComfyUI loads and patches
                resident, is_new = self._residents.take(message, progress)
                return Loaded(
                    request=message.request,
                    fingerprint=self._fingerprint(message, resident),
                    seconds=time.perf_counter() - start,
                    is_new=is_new,
                    models=self._residents.numbers,
                    digests=resident.digests if message.verify else {},
                    bytes_held=resident.bytes_held,
                    attributes=resident.attributes if is_new and not self._groups.rank else {},
                )
        except Exception as error:
            # Loading is no collective: this rank fails alone and can go on.
            log.exception("could not load %s", message.source or "tensors")
            return NotLoaded(message.request, f"{type(error).__name__}: {error}")

    def _fingerprint(self, message: Load, resident: Resident) -> str:
        if not message.look:
            return ""
        seed, parts = message.look
        return resident.fingerprint.of(Look(seed, parts, self._groups.rank))

    def drop(self, models: list[int] | None = None) -> None:
        """Drop models, all of them by default, and give their memory back."""
        with torch.inference_mode():  # Outside of it ComfyUI clones the weights that it is given.
            self._residents.drop(models)
        if models is None:
            self._calls.forget_decoder()

    def give_way(self, ranks: list[int]) -> None:
        """Free the device, if this rank is meant, for what ComfyUI wants to put there."""
        self._residents.captured.look_again()
        if self._groups.rank in ranks:
            with torch.inference_mode():
                self._residents.give_way()

    def settings_changed(self) -> None:
        """Free what was captured under settings of torch's and ComfyUI's that hold no more."""
        self._residents.captured.drop()

    def compute(self, message: Call) -> Answer:
        """Compute this rank's share of a call; see ``Calls``."""
        return self._calls.compute(message)

    def answered(self) -> None:
        """Do what could wait until the host had the answer."""
        self._calls.read_times()

    def free(self, message: Free) -> Unloaded:
        """Free what PipeFusion kept for streams that are over."""
        return self._calls.free(message)

    def forget(self, message: Forget) -> None:
        """Free what the host does not refer to any more."""
        self._calls.forget(message)

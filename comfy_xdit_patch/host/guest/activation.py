"""Put everything in place once ComfyUI's modules are imported.

Runs in: host process, called by ``bootstrap`` from inside an import.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from comfy_xdit_patch import __version__
from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.hardware.chosen_devices import devices_of
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.boundary import our_faults_stay_ours
from comfy_xdit_patch.host.guest.host import Host
from comfy_xdit_patch.host.guest.patchset import PatchSet
from comfy_xdit_patch.host.guest.points import (
    control_points,
    decode_points,
    execution_points,
    sampling_points,
    server_points,
)
from comfy_xdit_patch.host.guest.wrappers import Wrappers
from comfy_xdit_patch.host.pool.inheritance import capture_host_state
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.host.reading.eligibility import Pristine
from comfy_xdit_patch.marks import (
    CONTROL_MODULES,
    DECODE_MODULES,
    EXECUTION_MODULES,
    SAMPLING_MODULES,
    SERVER_MODULES,
)
from comfy_xdit_patch.settings import Settings, read_settings, unknown_names

log = logging.getLogger("comfy_xdit_patch")


class Activation:
    """Whether the package is active in this process, with a host, or refused with a reason."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.refused: str | None = None
        self.sampling: PatchSet | None = None
        self.controls: PatchSet | None = None
        self.decode: PatchSet | None = None
        self.server: PatchSet | None = None
        self.execution: PatchSet | None = None
        self._wrappers: Wrappers | None = None
        self._ready: set[frozenset[str]] = set()

    def modules_ready(self, names: frozenset[str], root: str) -> None:
        """Act on a complete set of ComfyUI's modules."""
        self._ready.add(names)
        if names == SERVER_MODULES:
            self._activate_server()
            return
        if names == SAMPLING_MODULES:
            self._activate_sampling(root)
        if self.host is None:
            return
        if self.decode is None and DECODE_MODULES in self._ready:
            self._activate_decode(self.host)
        if self.controls is None and CONTROL_MODULES in self._ready:
            self._activate_controls(self.host)
        if self.execution is None and EXECUTION_MODULES in self._ready:
            self._activate_execution()

    def status(self) -> dict[str, Any]:
        """The status object of ``GET /xdit/status``."""
        body: dict[str, Any] = {"version": __version__}
        if self.host is None:
            return {**body, "state": "refused", "reason": self.refused}
        settings = self.host.settings
        shown = {name: repr(getattr(settings, name)) for name in Settings.__slots__}
        return {**body, "settings": shown, **self.host.status()}

    def change(self, settings: Settings) -> None:
        """Go on under other settings; the workers end, and new ones start with the next run.

        To be called between runs, in a process that is active.

        Raises:
            SettingsError: they do not fit this machine, or leave nothing active.
        """
        assert self.host is not None, "active"
        assert self._wrappers is not None, "made with the host"
        devices = _devices_of(settings)
        if isinstance(devices, Refusal):
            raise SettingsError(f"These settings leave nothing active: {devices.reason}.")
        self.host.hooks.make_up()
        self.host.pool.change(devices, settings)
        self.host = self.host.successor(settings)
        self._wrappers.serve(self.host)

    def _activate_sampling(self, root: str) -> None:
        for name, hint in unknown_names().items():
            log.warning("xDiT: %s is not a setting of ours and has no effect. %s", name, hint)
        try:
            settings = read_settings()
            devices = _devices_of(settings)
        except SettingsError as error:
            self.refused = str(error)
            log.error("xDiT: %s ComfyUI goes on alone.", error)
            return
        if isinstance(devices, Refusal):
            self.refused = devices.reason
            log.info("xDiT: not active: %s.", devices.reason)
            return
        pool = Pool(devices=devices, host_state=capture_host_state(root), settings=settings)
        host = Host(settings=settings, pool=pool, pristine=Pristine(sys.modules))
        self._wrappers = Wrappers(host)
        patch_set = PatchSet(sampling_points(self._wrappers))
        misfit = patch_set.install()
        if misfit is not None:
            self.refused = f"this ComfyUI does not fit: {misfit}"
            log.error("xDiT: %s. ComfyUI goes on alone.", self.refused)
            return
        self.host, self.sampling = host, patch_set
        atexit.register(stop_unless_forked, pool, os.getpid())
        log.info(
            "xDiT: active on %d %s, strategy %s.",
            len(devices),
            pool.device_word,
            settings.strategy,
        )
        if len(devices) == 1:
            log.warning("xDiT: one rank makes no image faster; XDIT_GPUS names a single device.")

    def _activate_controls(self, host: Host) -> None:
        host.pristine.remember_controls(sys.modules)
        assert self._wrappers is not None, "made with the host"
        self.controls = PatchSet(control_points(self._wrappers))
        misfit = self.controls.install()
        if misfit is not None:
            log.warning("xDiT: ControlNets run on one GPU: %s", misfit)

    def _activate_decode(self, host: Host) -> None:
        host.pristine.remember_decoder(sys.modules)
        assert self._wrappers is not None, "made with the host"
        self.decode = PatchSet(decode_points(self._wrappers))
        misfit = self.decode.install()
        if misfit is not None:
            log.warning("xDiT: pictures are decoded on one GPU: %s", misfit)

    def _activate_execution(self) -> None:
        assert self._wrappers is not None, "made with the host"
        self.execution = PatchSet(execution_points(self._wrappers))
        misfit = self.execution.install()
        if misfit is not None:
            log.warning("xDiT: each sampling run has a line of its own in this log: %s", misfit)

    def _activate_server(self) -> None:
        self.server = PatchSet(server_points(self._around_add_routes))
        misfit = self.server.install()
        if misfit is not None:
            log.warning("xDiT: GET /xdit/status is not available: %s", misfit)

    def _around_add_routes(
        self, wrapped: Callable[..., Any], server: Any, args: Any, kwargs: Any
    ) -> Any:
        host = self.host
        if host is not None and host.settings.starts_early and host.pool.world_size > 1:
            with our_faults_stay_ours("an early start"):
                server.loop.call_soon(host.pool.get_ready)  # The loop runs when the server does.
        with our_faults_stay_ours("adding the status route"):
            from aiohttp import web

            async def answer(_: web.Request) -> web.Response:
                return web.json_response(self.status())

            server.routes.get("/xdit/status")(answer)
        return wrapped(*args, **kwargs)


def stop_unless_forked(pool: Pool, owner_pid: int) -> None:
    """End the workers with this process, but not with one that somebody forked from it."""
    if os.getpid() == owner_pid:
        pool.stop()


def _devices_of(settings: Settings) -> tuple[Device, ...] | Refusal:
    """The devices of all ranks, which are of the kind that ComfyUI computes on.

    On another kind, dtypes and results would differ.

    Raises:
        SettingsError: the settings ask for what cannot be.
    """
    import comfy.model_management

    devices = devices_of(settings)
    own = comfy.model_management.get_torch_device().type
    if isinstance(devices, Refusal) or own == ("cpu" if devices[0].is_cpu else "cuda"):
        return devices
    if settings.gpus.kind == "all":
        return Refusal(f"ComfyUI computes on {own}, and ranks would on GPUs")
    if devices[0].is_cpu:
        raise SettingsError(
            f"XDIT_GPUS=cpu:{len(devices)} needs ComfyUI to be started with --cpu; it uses {own}."
        )
    raise SettingsError(f"XDIT_GPUS names GPUs, and ComfyUI computes on {own}.")


ACTIVATION = Activation()


def modules_ready(names: frozenset[str], root: str) -> None:
    """Entry point for ``bootstrap``."""
    ACTIVATION.modules_ready(names, root)

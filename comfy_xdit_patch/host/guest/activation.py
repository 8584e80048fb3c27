"""Put everything in place once ComfyUI's modules are imported.

Runs in: host process, called by ``bootstrap`` from inside an import.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.hardware.chosen_devices import devices_of
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.boundary import our_faults_stay_ours
from comfy_xdit_patch.host.guest.between import Between
from comfy_xdit_patch.host.guest.host import Host
from comfy_xdit_patch.host.guest.patchset import PatchSet
from comfy_xdit_patch.host.guest.points import (
    control_points,
    decode_points,
    execution_points,
    sampling_points,
    server_points,
)
from comfy_xdit_patch.host.guest.routes import add_routes
from comfy_xdit_patch.host.guest.settings_routes import add_settings_routes
from comfy_xdit_patch.host.guest.status import Reporter, inactive
from comfy_xdit_patch.host.guest.steering import Steering
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
from comfy_xdit_patch.report.schema import Status
from comfy_xdit_patch.settings import Settings, read_settings, unknown_names

log = logging.getLogger("comfy_xdit_patch")

WEB = str(Path(__file__).parents[2] / "web")
"""What ComfyUI's page loads of this package."""


class Activation:
    """Whether the package is active in this process, with a host, or refused with a reason."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.refused: str | None = None
        """Why it is not active; by ``is_off`` that is as it should be on this machine."""
        self.is_off = False
        self.sampling: PatchSet | None = None
        self.controls: PatchSet | None = None
        self.decode: PatchSet | None = None
        self.server: PatchSet | None = None
        self.execution: PatchSet | None = None
        self.between = Between()
        self.steering = Steering(self)
        self._wrappers: Wrappers | None = None
        self._reporter = Reporter()
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

    def status(self) -> Status:
        """What ``GET /xdit/status`` and ``GET /xdit/metrics`` are made of."""
        if self.host is None:
            return inactive("off" if self.is_off else "refused", self.refused)
        return self._reporter.status(self.host)

    @property
    def _is_status_open(self) -> bool:
        return self.host is not None and self.host.settings.is_status_open

    def devices_for(self, settings: Settings) -> tuple[Device, ...]:
        """The devices of all ranks under other settings; those of now if they switch off.

        Raises:
            SettingsError: they do not fit this machine, or leave nothing active.
        """
        assert self.host is not None, "active"
        if settings.is_off:
            return self.host.pool.devices
        devices = _devices_of(settings)
        if isinstance(devices, Refusal):
            raise SettingsError(f"These settings leave nothing active: {devices.reason}.")
        return devices

    def change(self, devices: tuple[Device, ...], settings: Settings) -> None:
        """Go on with other devices or settings, or switched off; see ``Pool.change``.

        To be called between runs, in a process that is active.
        """
        assert self.host is not None, "active"
        assert self._wrappers is not None, "made with the host"
        self.host = self.host.successor(devices, settings)
        self._wrappers.serve(self.host)
        for patch_set in filter(None, (self.sampling, self.controls, self.decode)):
            patch_set.uninstall() if settings.is_off else patch_set.install()
        if settings.is_off:
            log.info("xDiT: switched off, ComfyUI computes alone.")
            return
        word = self.host.pool.device_word
        log.info("xDiT: from now on %d %s, strategy %s.", len(devices), word, settings.strategy)

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
            self.refused, self.is_off = devices.reason, True
            log.info("xDiT: not active: %s.", devices.reason)
            return
        pool = Pool(
            devices=devices,
            host_state=capture_host_state(root),
            settings=settings,
            unless_busy=self.between.unless_busy,
        )
        host = Host(settings=settings, pool=pool, pristine=Pristine(sys.modules))
        self._wrappers = Wrappers(host, self.between)
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
        with our_faults_stay_ours("adding the panel"):
            sys.modules["nodes"].EXTENSION_WEB_DIRS["comfy-xdit"] = WEB
        with our_faults_stay_ours("adding routes"):
            add_routes(server, self.status, lambda: self._is_status_open)
            add_settings_routes(server.routes, self)
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

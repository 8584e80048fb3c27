"""Change the settings of a running rig process, between two runs.

Runs in: the host of a rig server (``POST /rig/settings``) or of a process of ``inside``.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def change_settings(variables: Mapping[str, str]) -> None:
    """Go on as if ComfyUI had been started with these XDIT_* variables."""
    from comfy_xdit_patch.host.guest.activation import ACTIVATION
    from comfy_xdit_patch.settings import read_settings

    for name in [name for name in os.environ if name.startswith("XDIT_")]:
        del os.environ[name]
    os.environ.update({k: v for k, v in variables.items() if k.startswith("XDIT_")})
    settings = read_settings()
    devices = ACTIVATION.devices_for(settings)
    assert ACTIVATION.host is not None, "a process with ranks"
    ACTIVATION.host.pool.dismiss()  # No test finds the workers of another one.
    ACTIVATION.change(devices, settings)


def adapt_server(server: Any) -> None:
    """Add the door to a server with ranks."""
    if not os.environ.get("XDIT_GPUS", "").startswith("cpu:"):
        return
    add_routes = server.PromptServer.add_routes

    def add_routes_and_door(self: Any) -> None:
        from aiohttp import web

        async def answer(request: web.Request) -> web.Response:
            change_settings(await request.json())
            return web.json_response({})

        self.routes.post("/rig/settings")(answer)
        add_routes(self)

    server.PromptServer.add_routes = add_routes_and_door

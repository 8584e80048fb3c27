"""What ComfyUI's server answers beside its own: ``/xdit/status`` and ``/xdit/metrics``.

Runs in: host process, in the thread of ComfyUI's server.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

from comfy_xdit_patch.report.metrics import CONTENT_TYPE, metrics_text
from comfy_xdit_patch.report.schema import Status


def add_routes(server: Any, status: Callable[[], Status], is_open: Callable[[], bool]) -> None:
    """Add them to a server whose routes are not fixed yet.

    Args:
        is_open: whether other machines are told everything too.
    """
    from aiohttp import web

    def is_trusted(request: web.Request) -> bool:
        return is_open() or is_of_this_machine(request.remote)

    async def answer_status(request: web.Request) -> web.Response:
        now = status()
        return web.json_response(now.to_dict() if is_trusted(request) else now.short())

    async def answer_metrics(request: web.Request) -> web.Response:
        text = metrics_text(status(), is_short=not is_trusted(request))
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    server.routes.get("/xdit/status")(answer_status)
    server.routes.get("/xdit/metrics")(answer_metrics)


def is_of_this_machine(address: str | None) -> bool:
    """Whether a request came over loopback, or over a socket that is a file (no address)."""
    return not address or is_loopback(address)


def is_loopback(host: str) -> bool:
    """Whether this is loopback's name, or an address of it, IPv4 as IPv6 writes it too."""
    address = host.partition("%")[0].lower().removeprefix("::ffff:")
    try:
        return host == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False

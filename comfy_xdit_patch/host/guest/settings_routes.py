"""Change settings over HTTP, for whoever may.

Runs in: host process, on the loop of ComfyUI's server; what waits runs in threads beside it.

    GET  /xdit/settings    values, legal values, and what waits for the end of a prompt
    POST /xdit/settings    {"XDIT_STRATEGY": "ring", "XDIT_GPUS": null}: null is the environment's
    POST /xdit/measure     {}: forget what ``auto`` measured

A page of another origin in the user's browser can reach loopback too. It cannot send JSON without
being asked for its origin first, and the browser names that origin. Its own name may lead to this
machine (DNS rebinding): so it is loopback's own names only, unless others are let in.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from comfy_xdit_patch.errors import HttpError, SettingsError
from comfy_xdit_patch.host.guest.routes import is_loopback
from comfy_xdit_patch.variables import VARIABLES

if TYPE_CHECKING:
    from aiohttp import web

    from comfy_xdit_patch.host.guest.activation import Activation

BY_A_PROXY = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


def add_settings_routes(routes: web.RouteTableDef, activation: Activation) -> None:
    """Add the routes above to those of ComfyUI's server."""
    from aiohttp import web

    def answered(status: HTTPStatus, **more: Any) -> web.Response:
        return web.json_response({**activation.steering.to_dict(), **more}, status=status)

    def guarded(
        handle: Callable[[dict[str, Any]], bool],
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            body: dict[str, Any] = {}
            try:
                check(request, takes_remote=_active(activation).settings.takes_remote)
                body = await _body_of(request)
                # In a thread: it asks devices, and may wait for workers to end.
                is_done = await asyncio.to_thread(handle, body)
            except HttpError as error:
                return answered(error.status, error=str(error))
            except SettingsError as error:
                legal = {v.name: v.legal for v in VARIABLES if v.name in body}
                return answered(HTTPStatus.BAD_REQUEST, error=str(error), asked=body, legal=legal)
            return answered(HTTPStatus.OK if is_done else HTTPStatus.ACCEPTED)

        return answer

    def measure(_: dict[str, Any]) -> bool:
        return activation.between.do("measuring again", lambda: _active(activation).auto.forget())

    async def show(_: web.Request) -> web.Response:
        return answered(HTTPStatus.OK)

    routes.get("/xdit/settings")(show)
    routes.post("/xdit/settings")(guarded(activation.steering.ask))
    routes.post("/xdit/measure")(guarded(measure))


def check(request: web.Request, *, takes_remote: bool) -> None:
    """See whether whoever sends this may change something.

    Raises:
        HttpError: they may not.
    """
    if request.content_type != "application/json":
        raise HttpError(
            "The body must be JSON, with the header Content-Type: application/json.",
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    host = request.headers.get("Host", "").lower()
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower().partition("://")[2] != host:
        raise HttpError("A page of another origin may not change settings.")
    name = re.sub(r":\d+$", "", host).strip("[]")
    is_here = is_loopback(request.remote or "") and is_loopback(name)
    if not takes_remote and (not is_here or any(name in request.headers for name in BY_A_PROXY)):
        raise HttpError(
            "Only this machine may change settings, by localhost or a loopback address and not "
            "through a proxy, unless ComfyUI is started with XDIT_REMOTE_SETTINGS=1."
        )


def _active(activation: Activation) -> Any:
    host = activation.host
    if host is None:
        raise HttpError(
            f"There is nothing to change before a restart of ComfyUI: {activation.refused}",
            HTTPStatus.CONFLICT,
        )
    return host


async def _body_of(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise HttpError("The body must be a JSON object.", HTTPStatus.BAD_REQUEST)
    return body

"""Neighbours in ComfyUI's process: they take hold of what we hold, each in a way of its own.

Runs in: a ComfyUI process of a test server.

Each module does at import what packs do at import. ``GET /neighbours`` says how often each was at
work; ``POST /neighbours/restart`` does what ComfyUI-Manager does.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from aiohttp import web
from server import PromptServer

from . import forks, functions, process_group

routes = PromptServer.instance.routes


@routes.get("/neighbours")
async def counts(_: Any) -> web.Response:
    """Say how often each neighbour was at work."""
    return web.json_response({**functions.counts, **forks.counts(), **process_group.counts()})


@routes.post("/neighbours/restart")
async def restart(_: Any) -> None:
    """Start ComfyUI anew in this very process."""
    os.execv(sys.executable, [sys.executable, *sys.argv])


NODE_CLASS_MAPPINGS: dict[str, type] = {}

"""Neighbours in ComfyUI's process: they take hold of what we hold, each in a way of its own.

Runs in: a ComfyUI process of a test server.

Each module does at import what packs do at import; ``RIG_NEIGHBOURS`` names the modules, all of
them if it is not set. ``GET /neighbours`` says how often each was at
work; ``POST /neighbours/restart`` does what ComfyUI-Manager does.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from aiohttp import web
from server import PromptServer

NAMES = os.environ.get("RIG_NEIGHBOURS", "forks functions process_group").split()
neighbours = [importlib.import_module(f"{__name__}.{name}") for name in NAMES]
routes = PromptServer.instance.routes


@routes.get("/neighbours")
async def counts(_: Any) -> web.Response:
    """Say how often each neighbour was at work."""
    found: dict[str, int] = {}
    for neighbour in neighbours:
        found |= neighbour.counts()
    return web.json_response(found)


@routes.post("/neighbours/restart")
async def restart(_: Any) -> None:
    """Start ComfyUI anew in this very process."""
    os.execv(sys.executable, [sys.executable, *sys.argv])


NODE_CLASS_MAPPINGS: dict[str, type] = {}

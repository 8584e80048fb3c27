"""A line in ComfyUI's page, at the node that runs, and how far that node is.

Runs in: host process.

ComfyUI's server and its executor are looked up and never imported: a program that uses ComfyUI
without its server has not imported them, and has no page.
"""

from __future__ import annotations

import sys
from typing import Any

from comfy_xdit_patch.host.boundary import our_faults_stay_ours


def tell(text: str) -> None:
    """Show a text at the node that is executed in this thread."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    context_of = getattr(sys.modules.get("comfy_execution.utils"), "get_executing_context", None)
    page = getattr(server, "instance", None)
    if page is None or context_of is None:
        return
    with our_faults_stay_ours("telling ComfyUI's page"):
        context = context_of()
        if context is not None:
            page.send_progress_text(f"xDiT: {text}", context.node_id)


def progress() -> tuple[int, int] | None:
    """How far the node that runs is, as the page shows it: steps done, and all of them.

    None where ComfyUI does not say.
    """
    module: Any = sys.modules.get("comfy_execution.progress")
    nodes = getattr(getattr(module, "global_progress_registry", None), "nodes", {})
    for node in reversed(tuple(nodes.values())):
        if node["state"].value == "running" and node["max"] > 1:
            return int(node["value"]), int(node["max"])
    return None

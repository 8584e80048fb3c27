"""Convert workflows from the format of ComfyUI's web page to the format of ``POST /prompt``.

Runs in: a process of its own, as a script. comfy-cli, which does the work, writes a folder into the
user's configuration when it is imported; the caller gives this process a home of its own.

Reads ``{"workflows": {name: workflow}, "object_info": ...}`` from standard input and writes
``{name: graph}`` to standard output.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Convert everything from standard input."""
    from comfy_cli.workflow_to_api import convert_ui_to_api  # type: ignore[import-not-found]

    task = json.load(sys.stdin)
    object_info = task["object_info"]
    graphs = {name: convert_ui_to_api(w, object_info) for name, w in task["workflows"].items()}
    json.dump(graphs, sys.stdout)


if __name__ == "__main__":
    main()

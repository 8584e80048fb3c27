"""ComfyUI's own workflow templates: read from the package index at test time, converted, shrunk.

Runs in: the tests.

Nothing of them is committed but their names. Each version of ComfyUI pins one version of its
template packages; the FLUX workflows are all in one of those packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rig.downloads import Wheel, obtain
from rig.environment import RigError
from rig.graphs import Graph
from rig.server import Server

PACKAGES = {
    "0.33.0": Wheel(
        "comfyui-workflow-templates-json==0.1.50",
        "246a43d92fe618c5605fb00555d28e1c149008e017568999e33bb444d761bf7e",
    ),
    "0.3.75": Wheel(
        "comfyui-workflow-templates-media-image==0.3.17",
        "1454d562881dcbe854ea77cd40a74d45551355945cb4773650bf2007f5927fd6",
    ),
}
CONVERTER = Wheel(
    "comfy-cli==1.23.0",
    "3cd4bf80dd93b759e910fa825951c154781b8b95e526da59155ab96656483b31",
)
CONVERSION_DEADLINE_S = 120

Workflow = dict[str, Any]


def workflows(version: str) -> dict[str, Workflow]:
    """Return every template of a version's package that is a workflow, by name."""
    found: dict[str, Workflow] = {}
    with zipfile.ZipFile(obtain(PACKAGES[version])) as archive:
        for member in archive.namelist():
            path = Path(member)
            if path.suffix == ".json" and path.parent.name == "templates":
                content = json.loads(archive.read(member))
                if isinstance(content, dict) and "nodes" in content:
                    found[path.stem] = content
    return found


def convert(server: Server, workflows: dict[str, Workflow]) -> dict[str, Graph]:
    """Convert workflows by the definitions of the nodes of this server."""
    task = {"workflows": workflows, "object_info": server.request("/object_info")}
    with tempfile.TemporaryDirectory(prefix="comfy-cli-") as home:
        environment = {name: v for name, v in os.environ.items() if not name.startswith("XDG_")}
        environment |= {"HOME": home, "PYTHONPATH": str(obtain(CONVERTER))}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("convert_workflows.py"))],
            input=json.dumps(task),
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=CONVERSION_DEADLINE_S,
        )
    if done.returncode:
        raise RigError(f"comfy-cli could not convert: {done.stderr[-2000:]}")
    graphs: dict[str, Graph] = json.loads(done.stdout)
    return graphs

"""As in a container: a root that is read-only, no home, no place for temporary files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rig.checkpoints import Sizes, models_directory
from rig.trees import Tree

# What the container's volume is for: argv[5], the base directory, all that can be written.
IN_NAMESPACE = """
import json, os, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from rig import graphs
from rig.server import Server, base_directory
from rig.trees import Tree
for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
try:
    refused = tempfile.gettempdir()
except FileNotFoundError as error:
    refused = str(error)
tree, models, base = Tree(sys.argv[2], Path(sys.argv[3])), Path(sys.argv[4]), Path(sys.argv[5])
graph = graphs.with_values(graphs.load("ksampler_dev"), seed=303, size=(128, 128), steps=2)
env = {"XDIT_GPUS": "cpu:2", "XDIT_STRICT": "1", "XDG_CACHE_HOME": "/not-there"}
env |= {"XDIT_LOG_DIR": str(base / "logs")}
with (
    base_directory(base, models, keep=True),
    Server(tree, base, env=env, is_cold=True) as server,
):
    server.run(graph, 300)
    print(json.dumps({"refused": refused, "run": server.status()["last_run"]}))
"""
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && exec "$@"'


@pytest.mark.newest_only
@pytest.mark.slow  # a server and a pool of its own, for no other can be inside
def test_everything_runs_where_only_a_volume_can_be_written(tree: Tree, tmp_path: Path) -> None:
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount"]
    unshare += ["sh", "-c", READ_ONLY, str(tmp_path)]
    allowed = subprocess.run([*unshare, "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"this system allows no mount namespace: {allowed.stderr.decode().strip()}")
    tests = str(Path(__file__).parents[1])
    models = str(models_directory(Sizes(hidden=512, variants=True)))
    command = [*unshare, sys.executable, "-c", IN_NAMESPACE, tests, tree.version, str(tree.path)]
    command += [models, str(tmp_path)]
    done = subprocess.run(
        command, cwd="/", capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "No usable temporary directory" in answer["refused"]
    assert answer["run"]["steps_parallel"] == answer["run"]["steps"] == 2
    assert list(tmp_path.glob("logs/*/worker-1.log"))

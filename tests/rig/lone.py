"""A server with ranks that shares no directory with anybody, and what lay on the disk before it.

Runs in: the tests.
"""

from __future__ import annotations

import stat
from contextlib import ExitStack
from pathlib import Path

from rig.checkpoints import Sizes, models_directory
from rig.server import Server, base_directory
from rig.trees import Tree

NODE_PACK = Path(__file__).parent / "node_packs" / "alone" / "neighbours"

Listing = dict[str, tuple[int, int]]


def listing(folder: Path) -> Listing:
    """Every file below a folder, with size and time of change; Python's own caches apart."""
    return {
        str(path.relative_to(folder)): (status.st_size, status.st_mtime_ns)
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts and stat.S_ISREG((status := path.lstat()).st_mode)
    }


class LoneServer:
    """Started when it is asked for first; a home and a temporary directory of its own.

    Its node pack is ``neighbours`` without any: only its routes.
    """

    def __init__(self, tree: Tree, folder: Path, *, watched: tuple[Path, ...]) -> None:
        self._tree = tree
        self._stack = ExitStack()
        self._server: Server | None = None
        self._folder = folder
        self.home, self.temporary = folder / "home", folder / "temporary"
        self._watched = (self.home, *watched)
        self.before: dict[Path, Listing] = {}

    def __call__(self) -> Server:
        if self._server is None:
            self.home.mkdir()
            self.temporary.mkdir()
            self.before = {path: listing(path) for path in self._watched}
            models = models_directory(Sizes(hidden=256))
            base = self._stack.enter_context(base_directory(self._folder / "comfyui", models))
            env = {
                "XDIT_GPUS": "cpu:2",
                "XDIT_START_TIMEOUT": "400",
                "HOME": str(self.home),
                "TMPDIR": str(self.temporary),
                "XDG_CACHE_HOME": "",
                "RIG_NEIGHBOURS": "",
            }
            server = Server(self._tree, base, env=env, node_packs=(NODE_PACK,))
            self._server = self._stack.enter_context(server)
        return self._server

    def stop(self) -> None:
        """End it; it does not start again."""
        self._stack.close()

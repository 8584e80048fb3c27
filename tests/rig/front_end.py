"""ComfyUI's own web page in a headless browser.

Runs in: the tests.

The page is the package that each ComfyUI asks for, read from the package index at test time; the
browser is the system's Chromium. Nothing of them is committed or installed.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rig.downloads import Wheel, obtain
from rig.environment import RigError, cache_root, exclusive
from rig.trees import Tree

WHEELS = {
    "1.49.6": "69cef7e67f22854852d1d7be68ff82f27bd4ff4b33de9c643d7eb1339769c421",
    "1.32.9": "737ea322fcef803635d2c8db7dd93122b381a371a8ef66e42762d355e9913c17",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def front_end(tree: Tree) -> Path:
    """Return the folder of the page that this ComfyUI asks for, unpacked once into the cache.

    Raises:
        RigError: its version is not pinned here.
    """
    wanted = (tree.path / "requirements.txt").read_text()
    match = re.search(r"^comfyui-frontend-package==(\S+)", wanted, re.MULTILINE)
    if match is None or match[1] not in WHEELS:
        raise RigError(f"ComfyUI {tree.version} asks for a front end that is not in {__file__}.")
    folder = cache_root() / "front-ends" / match[1]
    with exclusive("front-ends"):
        if not folder.exists():
            _unpack(Wheel(f"comfyui-frontend-package=={match[1]}", WHEELS[match[1]]), folder)
    return folder / "comfyui_frontend_package" / "static"


def _unpack(wheel: Wheel, folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as temporary:
        unpacked = Path(temporary) / "wheel"
        with zipfile.ZipFile(obtain(wheel)) as archive:
            archive.extractall(unpacked)
        unpacked.rename(folder)


def browser_path() -> str | None:
    """Return the system's Chromium, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Run the system's Chromium without a window; it reaches this machine only."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser_path(),
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield chromium
        chromium.close()

"""Download a pinned wheel once into the cache, and trust it only by its hash.

Runs in: any bare Python (standard library only).
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rig.environment import RigError, cache_root, exclusive, run_logged


@dataclass(frozen=True)
class Wheel:
    """One wheel on the package index."""

    requirement: str
    sha256: str


def obtain(wheel: Wheel) -> Path:
    """Return the file of a wheel, downloaded if the cache does not have it."""
    folder = cache_root() / "downloads" / wheel.sha256[:16]
    with exclusive("downloads"):
        kept = list(folder.glob("*.whl"))
        if not kept:
            kept = [_download(wheel, folder)]
    _check(kept[0], wheel)
    return kept[0]


def _download(wheel: Wheel, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".obtaining-", dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-input", "--no-deps", "--only-binary", ":all:", "-d", temporary]
        command += [wheel.requirement]
        log_path = cache_root() / "logs" / "downloads.log"
        run_logged(command, log_path, f"downloading {wheel.requirement}")
        (downloaded,) = Path(temporary).glob("*.whl")
        _check(downloaded, wheel)
        folder.mkdir(exist_ok=True)
        return downloaded.rename(folder / downloaded.name)


def _check(path: Path, wheel: Wheel) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise RigError(f"{path}: sha256 is {digest}, expected {wheel.sha256}.")

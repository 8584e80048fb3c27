"""Where the rig's models lie: one folder for the code that writes them, and none for older code.

Runs in: any bare Python (standard library only).

A process holds the folder that it uses until it ends, so another checkout that has other code, and
runs tests at the same time, leaves it alone. What nobody holds is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rig.environment import cache_root, exclusive

SOURCES = (
    "checkpoints.py",
    "controls.py",
    "corpus_diffusion.py",
    "corpus_models.py",
    "encoder_weights.py",
    "family_weights.py",
    "feature_models.py",
    "gguf_files.py",
    "loras.py",
    "lotus_weights.py",
    "quantised.py",
    "weights.py",
)
"""What decides the bytes of models. With the same code the same name has the same bytes."""
LOCK = ".in-use"

_held: dict[Path, IO[bytes]] = {}


def model_set(name: str, write: Callable[[Path], None]) -> Path:
    """Return a complete directory of models.

    Args:
        name: of the set, with all that tells it from others of the same code.
        write: writes the set into a directory, which it makes; called if the set is missing.
    """
    directory = _folder() / name
    if not directory.exists():
        # Renamed when complete; if somebody else was faster, theirs has the same content.
        building = directory.with_name(f".{name}.{uuid.uuid4().hex}")
        write(building)
        try:
            building.rename(directory)
        except OSError:
            shutil.rmtree(building)
    return directory


def _folder() -> Path:
    """Return the folder of the current code, held by this process from now on."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    folder = cache_root() / "models" / digest.hexdigest()[:12]
    if folder not in _held:
        with exclusive("models"):
            folder.mkdir(parents=True, exist_ok=True)
            _held[folder] = handle = (folder / LOCK).open("wb")
            fcntl.flock(handle, fcntl.LOCK_SH)
            for other in folder.parent.iterdir():
                if other != folder and not _is_held(other):
                    shutil.rmtree(other)
    return folder


def _is_held(folder: Path) -> bool:
    lock = folder / LOCK
    if not lock.exists():
        return False
    with lock.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

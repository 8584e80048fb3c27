"""Note which functions of the package a process enters, in order.

Runs in: every process of a rig server or of ``inside`` whose environment has ``RIG_TRACE``, a
directory: the ranks write what each request of theirs entered to ``<directory>/<pid>.json``.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

PACKAGE = f"{os.sep}comfy_xdit_patch{os.sep}"
entered: list[tuple[str, str]] = []
"""File and function, of everything that was entered."""


def note(frame: FrameType, event: str, _: Any) -> None:
    """Note a call of a function of ours; ``sys.setprofile`` calls this."""
    file = frame.f_code.co_filename
    if event == "call" and PACKAGE in file:
        entered.append((file.rpartition(PACKAGE)[2], frame.f_code.co_qualname))


def note_requests(folder: str) -> None:
    """Write what each request entered when the next one comes."""

    def by_request(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_qualname == "Worker._serve" and entered:
            with open(f"{folder}/{os.getpid()}.json", "w") as file:
                json.dump(entered, file)
            entered.clear()
        note(frame, event, argument)

    sys.setprofile(by_request)


if "worker.nursery" in " ".join(sys.orig_argv) and "RIG_TRACE" in os.environ:
    note_requests(os.environ["RIG_TRACE"])

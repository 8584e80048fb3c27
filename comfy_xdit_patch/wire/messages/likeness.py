"""What host and ranks say to each other so that the ranks compute as ComfyUI's process does.

Runs in: host and worker. No torch. See ``codec.py`` for the encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_xdit_patch.wire.messages.requests import Tree

_PLAIN = (bool, int, float, str, type(None))


def is_plain(option: Any) -> bool:
    """Whether one of ComfyUI's options is sent to the workers, who set it as it is here."""
    return isinstance(option, _PLAIN) or (
        isinstance(option, list) and all(isinstance(item, _PLAIN) for item in option)
    )


@dataclass(frozen=True, slots=True)
class Follow:
    """Settings of the host: torch's (``torch_settings.py``), and ComfyUI's plain options."""

    torch: dict[str, Tree]
    arguments: dict[str, Tree]


@dataclass(frozen=True, slots=True)
class Reach:
    """Say what a model's code reaches. Classes of its modules as ``module:path``."""

    request: int
    in_blocks: list[str]
    around: list[str]


@dataclass(frozen=True, slots=True)
class Reached:
    """Names that the code of a model's blocks reaches, and what is reached around them alone.

    By container and name: a description (``describing.py``). ``kernels`` are torch's operators that
    Python code has replaced here, ``modes`` what is active here around all of torch's functions.
    """

    request: int
    in_blocks: dict[str, dict[str, str]]
    around: dict[str, dict[str, str]]
    kernels: list[str]
    modes: list[str]

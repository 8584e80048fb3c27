"""The FLUX family: one row for each of ComfyUI's classes that the workers can run.

Runs in: host and worker. Names only: nothing of ComfyUI is imported here.

All rows have the same engine. A row says how the model's tokens reach ``forward_orig``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BLOCK_LISTS = ("double_blocks", "single_blocks")
"""Attributes of a model that hold its blocks, in the order in which these run."""
HEAD_WIDTH = 128
"""Features of an attention head, in every model of the family."""


@dataclass(frozen=True, slots=True)
class Member:
    """One class of ComfyUI's.

    ``is_pixel_space``: the model reads pixels, embeds them by a convolution, and has a head that
    works on patches (Chroma Radiance).
    """

    module: str
    name: str
    is_pixel_space: bool = False


MEMBERS = (
    # FLUX.1, FLUX.2, Ovis-Image and LongCat-Image.
    Member("comfy.ldm.flux.model", "Flux"),
    Member("comfy.ldm.chroma.model", "Chroma"),
    Member("comfy.ldm.chroma_radiance.model", "ChromaRadiance", is_pixel_space=True),
)


CONTROL = Member("comfy.ldm.flux.controlnet", "ControlNetFlux")
"""The ControlNets of XLabs, InstantX, Shakker (Union) and MistoLine: one class of ComfyUI's."""


def member_of(flux: Any) -> Member:
    """Return the row of a model of the family.

    Raises:
        KeyError: neither its class nor one that this was made from is in the table.
    """
    for cls in type(flux).__mro__:
        if (cls.__module__, cls.__name__) in _BY_CLASS:
            return _BY_CLASS[cls.__module__, cls.__name__]
    raise KeyError(type(flux).__name__)


def num_out_channels(flux: Any, num_in_channels: int) -> int:
    """Return how many channels a model's output has.

    Fill, Canny and Depth read more channels than they write. Chroma counts those of a whole patch
    in its parameters, and reads as many as it writes.
    """
    if member_of(flux).name == "Flux":
        return int(flux.params.out_channels)
    return num_in_channels


_BY_CLASS = {(member.module, member.name): member for member in MEMBERS}

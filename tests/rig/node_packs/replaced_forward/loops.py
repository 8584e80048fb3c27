"""A loop over FLUX's blocks of our own, for nodes that replace ``forward_orig``.

Runs in: a ComfyUI process of a test server.

Takes plain calls and ControlNets: no references with a time step of their own, no patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.flux.layers import timestep_embedding

Blocks = Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]


def embedded(
    flux: Any, img: Any, txt: Any, ids: tuple[Any, Any], times: Any, y: Any, guidance: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return image and text tokens, and what every block is given."""
    vec = flux.time_in(timestep_embedding(times, 256).to(img.dtype))
    if guidance is not None and flux.params.guidance_embed:
        vec = vec + flux.guidance_in(timestep_embedding(guidance, 256).to(img.dtype))
    vec = vec + flux.vector_in(y[:, : flux.params.vec_in_dim])
    img_ids, txt_ids = ids
    positions = flux.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
    return flux.img_in(img), flux.txt_in(txt), {"vec": vec, "pe": positions}


def all_blocks(
    flux: Any,
    after: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    control: Any = None,
    first: int = 0,
) -> Blocks:
    """Return a function that runs every block; ``after`` sees the image tokens of each.

    ``first`` is the first double block that it runs.
    """

    def residual(kind: str, number: int) -> torch.Tensor | None:
        residuals = (control or {}).get(kind, ())
        return residuals[number] if number < len(residuals) else None

    def run(img: torch.Tensor, txt: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        for number, block in list(enumerate(flux.double_blocks))[first:]:
            img, txt = block(img=img, txt=txt, **given)
            add = residual("input", number)
            if add is not None:
                img += add
            img = img if after is None else after(number, img)
        joint = torch.cat((txt, img), dim=1)
        for number, block in enumerate(flux.single_blocks):
            joint = block(joint, **given)
            add = residual("output", number)
            if add is not None:
                joint[:, txt.shape[1] :] += add
        return joint[:, txt.shape[1] :]

    return run
